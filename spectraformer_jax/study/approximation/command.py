"""How well feature maps approximate attention, on random or your own data.

    python -m spectraformer_jax.study approximation --out=DIR

For every pair, number of features, length and scale: the relative error of the
attention output (Frobenius norm) against exact attention, beside that of
uniform attention, which ignores queries and keys; bias and squared error of the
kernel; variance over draws of the weight matrix, with 95 % confidence
intervals; time and memory. DIR gets results.csv (row by row: what it holds is
not measured again), report.md with a ranking and a sentence of advice for each
setting, and pictures.

Queries and keys are those of --inputs, or standard normal; both are multiplied
by the scale, and attention divides scores by sqrt(head_dim) as usual.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.kernels import KERNELS
from spectraformer_jax.seeds import check_seed
from spectraformer_jax.study.approximation import plots, report
from spectraformer_jax.study.approximation.inputs import (
  Inputs,
  random_inputs,
  read_npz,
)
from spectraformer_jax.study.approximation.measure import (
  Options,
  measure,
  prepare,
  refer,
)
from spectraformer_jax.study.approximation.pair_spec import (
  Pair,
  all_pairs,
  parse_pair,
)
from spectraformer_jax.study.approximation.results import Results, Row
from spectraformer_jax.study.approximation.settings import settings_of

RESULTS, REPORT = "results.csv", "report.md"
PAIRS = ("posrf-iid", "posrf-orf", "oprf-orf", "saderf-orf", "trigrf-orf")
# Defaults of arguments that go with one kind of inputs only.
RANDOM = {"batch": 2, "heads": 2, "head_dim": 32}
WORKDIR = {"split": "dev", "examples": 4, "step": "best"}


class Cell(NamedTuple):
  """A row that is to be there.

  Attributes:
    pair: of the row.
    num_features: M, or None for a map without rows.
    inputs: cropped to the length.
    scale: of queries and keys.
    key: what identifies the row.
  """

  pair: Pair
  num_features: int | None
  inputs: Inputs
  scale: float
  key: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""
  add = parser.add_argument
  add(
    "--out",
    type=Path,
    required=True,
    metavar="DIR",
    help="folder for all results",
  )
  add(
    "--pairs",
    nargs="+",
    default=(),
    metavar="PAIR",
    help="component-matrix, with options as in "
    "'oprf(centred=True)-rom_hybrid(norms=chi)'; default: " + " ".join(PAIRS),
  )
  add(
    "--components",
    nargs="+",
    default=(),
    metavar="NAME",
    help="with --matrices: each with each, where they go together",
  )
  add("--matrices", nargs="+", default=(), metavar="NAME")
  add(
    "--num_features",
    type=int,
    nargs="+",
    default=(32, 64, 128, 256),
    metavar="M",
    help="default: 32 64 128 256",
  )
  add(
    "--lengths",
    type=int,
    nargs="+",
    metavar="T",
    help="first positions of the inputs; default: 1024 if random, else all",
  )
  add(
    "--scales",
    type=float,
    nargs="+",
    metavar="S",
    help="default: 0.25 0.5 1 2 if random, else 1",
  )
  add(
    "--inputs",
    type=Path,
    metavar="PATH",
    help="an npz file with query, key and value [B, T, N, H] (of many layers "
    "as layer/query ...), or the workdir of a run of train.py, whose layers' "
    "inputs are captured; default: random",
  )
  workdir = parser.add_argument_group("of a workdir")
  workdir.add_argument("--split", choices=("train", "dev", "test"))
  workdir.add_argument("--examples", type=int, help="the first ones; default 4")
  workdir.add_argument("--step", help="best (default), last, or a number")
  normal = parser.add_argument_group("of random inputs")
  normal.add_argument("--batch", type=int, help="default 2")
  normal.add_argument("--heads", type=int, help="default 2")
  normal.add_argument("--head_dim", type=int, help="default 32")
  how = parser.add_argument_group("how to measure")
  how.add_argument("--draws", type=int, default=10, help="default 10")
  how.add_argument("--seed", type=int, default=0, help="of draws and inputs")
  how.add_argument(
    "--causal", action="store_true", help="queries see keys up to their own"
  )
  how.add_argument(
    "--target",
    choices=tuple(KERNELS),
    default="softmax",
    help="exact attention to compare with; default softmax",
  )


def run(args: argparse.Namespace) -> int:
  """Measures what is missing, then writes the report and the pictures."""
  check(args)
  pairs = pairs_of(args)
  layers = inputs_of(args)
  options = Options(
    draws=args.draws,
    seed=args.seed,
    is_causal=args.causal,
    target=args.target,
  )
  console = Console()
  cells, skipped = plan(args, pairs, layers, options)
  for line in skipped:
    console.print(f"left out: {line}", style="yellow", highlight=False)
  if not cells:
    raise ValueError("nothing is left to measure.")
  args.out.mkdir(parents=True, exist_ok=True)
  results = Results(args.out / RESULTS)
  measure_missing(cells, results, options, console)
  rows = [results.find(cell.key) for cell in cells]
  settings = settings_of(rows)
  for setting in settings:
    report.print_setting(setting, console)
  pictures = plots.draw(settings, args.out)
  report.write(
    args.out / REPORT,
    settings,
    pictures=pictures,
    command=args.typed,
    skipped=skipped,
  )
  console.print(f"written: {args.out}/{REPORT}, {RESULTS}, {len(pictures)} PNG")
  return 0


def check(args: argparse.Namespace) -> None:
  """ValueError for numbers out of range or arguments that do not go together.

  Fills in defaults that depend on the kind of inputs.
  """
  for name in ("num_features", "lengths"):
    for number in getattr(args, name) or ():
      check_positive_int(f"--{name}", number)
  for scale in args.scales or ():
    if not scale > 0:
      raise ValueError(f"--scales must be positive, got {scale!r}.")
  check_positive_int("--draws", args.draws)
  check_seed("--seed", args.seed)
  if bool(args.components) != bool(args.matrices):
    raise ValueError("--components and --matrices go together.")
  if args.inputs and not args.inputs.exists():
    raise ValueError(f"--inputs: there is no {str(args.inputs)!r}.")
  is_workdir = bool(args.inputs) and args.inputs.is_dir()
  for defaults, applies, kind in (
    (RANDOM, not args.inputs, "random inputs"),
    (WORKDIR, is_workdir, "a workdir"),
  ):
    for name, default in defaults.items():
      given = getattr(args, name)
      if given is not None and not applies:
        raise ValueError(f"--{name} is for {kind} only.")
      value = default if given is None else given
      if isinstance(default, int):
        check_positive_int(f"--{name}", value)
      setattr(args, name, value)


def pairs_of(args: argparse.Namespace) -> list[Pair]:
  """The pairs that were asked for, each once; ValueError if one is unknown."""
  pairs = [parse_pair(text) for text in args.pairs]
  if args.components:
    pairs += all_pairs(args.components, args.matrices)
  pairs = pairs or [parse_pair(text) for text in PAIRS]
  pairs = list(dict.fromkeys(pairs))
  for pair in pairs:
    # Names and options are wrong or right whatever the size.
    pair.build(max(args.num_features) if pair.has_rows else None)
  return pairs


def inputs_of(args: argparse.Namespace) -> list[Inputs]:
  """The layers to measure on, in full length."""
  if args.inputs is None:
    return [
      random_inputs(
        batch=args.batch,
        length=max(args.lengths or (1024,)),
        num_heads=args.heads,
        head_dim=args.head_dim,
        seed=args.seed,
      )
    ]
  if args.inputs.is_file():
    return read_npz(args.inputs)
  # Here, because it brings in Flax and the data pipeline.
  from spectraformer_jax.study.approximation.capture import capture_workdir

  return capture_workdir(
    args.inputs, split=args.split, examples=args.examples, step=args.step
  )


def plan(
  args: argparse.Namespace,
  pairs: list[Pair],
  layers: list[Inputs],
  options: Options,
) -> tuple[list[Cell], list[str]]:
  """All rows, and which sizes of which pairs cannot be and why."""
  scales = args.scales or ((1.0,) if args.inputs else (0.25, 0.5, 1.0, 2.0))
  # What was typed twice is measured once.
  sizes, scales, lengths = (
    tuple(dict.fromkeys(given))
    for given in (args.num_features, scales, args.lengths or (None,))
  )
  cropped = [layer.cropped(n) for n in lengths for layer in layers]
  longest = max(cropped, key=lambda inputs: inputs.query.shape[1])
  cells, skipped = [], []
  for pair in pairs:
    for size in sizes if pair.has_rows else (None,):
      reason = _misfit(pair, size, longest, options)
      if reason:
        skipped.append(f"{pair.name}, M = {size}: {reason}")
        continue
      for inputs in cropped:
        for scale in scales:
          key = _key(pair, size, inputs, scale, options)
          cells.append(Cell(pair, size, inputs, scale, key))
  return cells, skipped


def _key(pair, size, inputs, scale, options) -> dict[str, Any]:
  """What identifies a row: a value for each of `results.KEYS`."""
  return {
    "inputs": inputs.name,
    "fingerprint": inputs.fingerprint,
    "length": inputs.length,
    "scale": scale,
    "component": pair.component,
    "matrix": pair.matrix,
    "num_features": size,
    "is_causal": str(options.is_causal),
    "target": options.target,
    "draws": options.draws,
    "seed": options.seed,
    "points": options.points,
  }


def _misfit(pair, size, inputs, options) -> str | None:
  """Why this size cannot be; None if it can. Nothing is compiled."""
  try:
    fm = pair.build(size)
    shape = inputs.query.shape
    sizes = {"head_dim": shape[3], "num_heads": shape[2]}
    if fm.weight_matrix.info.redrawable:
      jax.eval_shape(lambda rng: fm.init(rng, **sizes), jax.random.key(0))
    else:
      fm.init(jax.random.key(0), **sizes)
    fm.component.check_length(shape[1])
    if options.is_causal and (
      fm.info.needs_stats or not fm.component.info.causal_safe
    ):
      return (
        "it needs statistics of the whole sequence, so it cannot be causal; "
        "give it an option (statistics=constant)."
      )
  except ValueError as error:
    return str(error)
  return None


def measure_missing(
  cells: list[Cell], results: Results, options: Options, console: Console
) -> None:
  """Measures the cells that `results` does not hold, under a progress bar."""
  missing = [cell for cell in cells if not results.find(cell.key)]
  if len(missing) < len(cells):
    console.print(
      f"{len(cells) - len(missing)} of {len(cells)} rows are there already"
    )
  device = jax.devices()[0].device_kind
  references, program, made_for = {}, None, None
  columns = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
  )
  with Progress(*columns, console=console) as progress:
    task = progress.add_task("measuring", total=len(missing))
    for cell in missing:
      name = f"{cell.pair.name} M={cell.num_features}"
      progress.update(task, description=name)
      inputs = cell.inputs
      shapes = inputs.query.shape, inputs.key.shape, inputs.value.shape
      if made_for != (cell.pair, cell.num_features, shapes):
        made_for = cell.pair, cell.num_features, shapes
        program = prepare(cell.pair.build(cell.num_features), inputs, options)
      setting = inputs.fingerprint, cell.scale
      if setting not in references:
        references[setting] = refer(inputs, cell.scale, options)
      figures = measure(
        program, inputs, cell.scale, references[setting], options
      )
      results.add(Row(cell.key, figures, device))
      progress.advance(task)
