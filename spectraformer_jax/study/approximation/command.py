"""Measures how well feature maps approximate attention, on random or your data.

    python -m spectraformer_jax.study approximation --out=DIR

For every pair, number of features, length and scale, it measures: the relative
error of the attention output (Frobenius norm) against exact attention, beside
that of uniform attention, which ignores queries and keys; bias and squared
error of the kernel; variance over draws of the weight matrix, with 95 %
confidence intervals; time and memory. It writes to DIR: results.csv (row by
row; rows that are there are not measured again), report.md with a ranking and a
sentence of advice for each setting, and pictures.

Queries and keys are those of --inputs, or standard normal. Both are multiplied
by the scale; attention divides scores by sqrt(head_dim) as usual.
"""

import argparse
import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console
from rich.progress import Progress

from spectraformer_jax import commands
from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.hybrid_attention.exact_keys import kernel_of
from spectraformer_jax.kernels import KERNELS
from spectraformer_jax.seeds import check_seed
from spectraformer_jax.study.approximation import (
  measure,
  pair_spec,
  plots,
  report,
  results,
)
from spectraformer_jax.study.approximation.exact_flags import (
  add_exact_flags,
  exact_keys_from,
)
from spectraformer_jax.study.approximation.inputs import (
  Inputs,
  random_inputs,
  read_npz,
)
from spectraformer_jax.study.approximation.pair_spec import Pair
from spectraformer_jax.study.approximation.settings import settings_of

PROGRAM = "spectraformer_jax.study approximation"
RESULTS, REPORT = "results.csv", "report.md"
PAIRS = ("posrf-iid", "posrf-orf", "oprf-orf", "saderf-orf", "trigrf-orf")
SCALES = (0.25, 0.5, 1.0, 2.0)
# Defaults of flags that only one kind of inputs has.
RANDOM = {"batch": 2, "heads": 2, "head_dim": 32}
WORKDIR = {"split": "dev", "examples": 4, "step": "best"}


class Case(NamedTuple):
  """One measurement to make.

  Attributes:
    pair: to build the feature map from.
    inputs: cropped to the length.
    key: of the measurement.
  """

  pair: Pair
  inputs: Inputs
  key: results.Key


def make_parser() -> commands.Parser:
  """Makes the parser of the command's flags."""
  parser = commands.Parser(PROGRAM, __doc__)
  flag = parser.add_argument
  flags = functools.partial(parser.add_argument, nargs="+", default=())
  flag("--out", type=Path, required=True, help="folder for all results")
  flags(
    "--pairs",
    help="component-matrix, with options as in "
    "'oprf(centred=True)-rom_hybrid(norms=chi)'; default: " + " ".join(PAIRS),
  )
  flags("--components", help="with --matrices: all pairs that go together")
  flags("--matrices")
  flags("--num_features", type=int, help="default: 32 64 128 256")
  flags("--lengths", type=int, help="first positions; default: 1024, or all")
  flags("--scales", type=float, help="default: 0.25 0.5 1 2 if random, else 1")
  flag(
    "--inputs",
    type=Path,
    help="an npz file with query, key and value [B, T, N, H] (of many layers "
    "as layer/query ...), or the workdir of a run of train.py, whose layers' "
    "inputs are captured; default: random",
  )
  workdir_flag = parser.add_argument_group("of a workdir").add_argument
  workdir_flag("--split", choices=("train", "dev", "test"))
  workdir_flag("--examples", type=int, help="the first ones; default 4")
  workdir_flag("--step", help="best (default), last, or a number")
  random_flag = parser.add_argument_group("of random inputs").add_argument
  random_flag("--batch", type=int, help="default 2")
  random_flag("--heads", type=int, help="default 2")
  random_flag("--head_dim", type=int, help="default 32")
  how_flag = parser.add_argument_group("how to measure").add_argument
  how_flag("--draws", type=int, default=10, help="default 10")
  how_flag("--seed", type=int, default=0, help="of draws and inputs")
  how_flag(
    "--causal", action="store_true", help="queries see keys up to their own"
  )
  how_flag(
    "--target",
    choices=tuple(KERNELS),
    default="softmax",
    help="exact attention to compare with; default softmax",
  )
  add_exact_flags(parser)
  return parser


def main(argv: Sequence[str]) -> None:
  """Measures what is missing, then writes the report and the pictures."""
  args = make_parser().parse_args(argv)
  _check(args)
  options = measure.Options(
    args.causal,
    args.target,
    args.draws,
    args.seed,
    exact=exact_keys_from(args, is_causal=args.causal),
  )
  console = Console()
  cases, skipped = _plan(args, _pairs(args), _layers(args), options)
  for line in skipped:
    console.print(f"left out: {line}", style="yellow", highlight=False)
  if not cases:
    raise ValueError("nothing is left to measure.")
  args.out.mkdir(parents=True, exist_ok=True)
  stored = results.Results(args.out / RESULTS)
  settings = settings_of(_measure_all(cases, stored, options, console))
  for setting in settings:
    report.print_setting(setting, console)
  pictures = plots.draw(settings, args.out)
  report.write(
    args.out / REPORT,
    settings,
    pictures=pictures,
    command=f"python -m {PROGRAM} {shlex.join(argv)}",
    skipped=skipped,
  )
  console.print(f"written: {args.out}/{REPORT}, {RESULTS}, {len(pictures)} PNG")


def _check(args: argparse.Namespace) -> None:
  """Checks the flags, and fills in defaults that depend on the kind of inputs.

  Raises:
    ValueError: a number is out of range, or flags do not go together.
  """
  args.num_features = args.num_features or (32, 64, 128, 256)
  for name in ("num_features", "lengths"):
    for number in getattr(args, name):
      check_positive_int(f"--{name}", number)
  for scale in args.scales:
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
      if getattr(args, name) is None:
        setattr(args, name, default)
      elif not applies:
        raise ValueError(f"--{name} is for {kind} only.")
      if isinstance(default, int):
        check_positive_int(f"--{name}", getattr(args, name))


def _pairs(args: argparse.Namespace) -> list[Pair]:
  """The chosen pairs, each once; ValueError if one is unknown."""
  pairs = [pair_spec.parse_pair(text) for text in args.pairs]
  if args.components:
    pairs += pair_spec.all_pairs(args.components, args.matrices)
  pairs = list(dict.fromkeys(pairs or map(pair_spec.parse_pair, PAIRS)))
  for pair in pairs:
    # Names and options are wrong or right whatever the size.
    pair.build(max(args.num_features) if pair.takes_num_features else None)
  return pairs


def _layers(args: argparse.Namespace) -> list[Inputs]:
  """The inputs of each layer to measure on, not yet cropped."""
  if args.inputs is None:
    length = max(args.lengths or (1024,))
    shape = {"batch": args.batch, "length": length, "num_heads": args.heads}
    return [random_inputs(**shape, head_dim=args.head_dim, seed=args.seed)]
  if args.inputs.is_file():
    return read_npz(args.inputs)
  # Imported here: it loads Flax and the data pipeline.
  from spectraformer_jax.study.approximation.capture import capture_workdir

  return capture_workdir(
    args.inputs, split=args.split, examples=args.examples, step=args.step
  )


def _plan(
  args: argparse.Namespace,
  pairs: list[Pair],
  layers: list[Inputs],
  options: measure.Options,
) -> tuple[list[Case], list[str]]:
  """Returns all cases, and the impossible sizes of pairs with the reasons."""
  scales = args.scales or ((1.0,) if args.inputs else SCALES)
  # Values that are typed twice count once.
  scales = list(dict.fromkeys(scales))
  sizes = list(dict.fromkeys(args.num_features))
  lengths = list(dict.fromkeys(args.lengths or (None,)))
  cropped = [layer.cropped(n) for n in lengths for layer in layers]
  longest = max(cropped, key=lambda inputs: inputs.query.shape[1])
  cases, skipped = [], []
  for pair in pairs:
    for size in sizes if pair.takes_num_features else (None,):
      reason = _why_impossible(pair, size, longest, options)
      if reason:
        skipped.append(f"{pair.name}, M = {size}: {reason}")
        continue
      for inputs in cropped:
        for scale in scales:
          key = results.Key(
            inputs.name,
            inputs.fingerprint,
            inputs.length,
            scale,
            pair.component,
            pair.matrix,
            size,
            *options[:-1],
            *options.exact,
          )
          cases.append(Case(pair, inputs, key))
  return cases, skipped


def _why_impossible(
  pair: Pair, size: int | None, inputs: Inputs, options: measure.Options
) -> str | None:
  """Why this size is impossible; None if it is possible. Compiles nothing."""
  try:
    fm = pair.build(size)
    _, length, num_heads, head_dim = inputs.query.shape
    init = functools.partial(fm.init, head_dim=head_dim, num_heads=num_heads)
    if fm.weight_matrix.info.redrawable:
      jax.eval_shape(init, jax.random.key(0))
    else:
      init(jax.random.key(0))
    fm.component.check_length(length)
    if not options.exact.are_none:
      kernel_of(fm.component)
  except ValueError as error:
    return str(error)
  if options.is_causal and (
    fm.info.needs_stats or not fm.component.info.causal_safe
  ):
    return (
      "it needs statistics of the whole sequence, so it cannot be causal; "
      "give it an option (statistics=constant)."
    )
  return None


def _measure_all(
  cases: list[Case],
  stored: results.Results,
  options: measure.Options,
  console: Console,
) -> list[results.Measurement]:
  """Measures the cases that `stored` lacks; returns the rows of all cases."""
  missing = [case for case in cases if case.key not in stored.rows]
  if len(missing) < len(cases):
    console.print(
      f"{len(cases) - len(missing)} of {len(cases)} rows are there already"
    )
  references, programs = {}, {}
  with Progress(console=console) as progress:
    task = progress.add_task("measuring", total=len(missing))
    for pair, inputs, key in missing:
      name = f"{pair.name} M={key.num_features}"
      progress.update(task, description=name)
      shapes = inputs.query.shape, inputs.key.shape, inputs.value.shape
      if (name, shapes) not in programs:  # only the latest is kept
        fm = pair.build(key.num_features)
        programs = {(name, shapes): measure.prepare(fm, inputs, options)}
      setting = key.fingerprint, key.scale
      if setting not in references:
        references[setting] = measure.make_reference(inputs, key.scale, options)
      figures = measure.measure(
        programs[name, shapes], inputs, key.scale, references[setting], options
      )
      device = jax.devices()[0].device_kind
      stored.add(results.Measurement(key, figures, device))
      progress.advance(task)
  return [stored.rows[case.key] for case in cases]
