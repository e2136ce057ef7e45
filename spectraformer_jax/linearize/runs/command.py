"""Makes the softmax attention of a trained model linear.

    python -m spectraformer_jax.linearize --workdir=RUN --out=DIR

For each layer of a run of train.py, it fits a feature map to exact attention
on training examples, without labels; puts the maps into the model, of which
nothing else changes; and measures on dev examples what was lost. DIR is then
the workdir of a finished run, which `train evaluate`, `train predict`,
`sf.nn.load_pretrained` and `--config.model.init_from` take. Its report.md has
the error of each layer, the model's answers, times and sizes, and a sentence of
advice. With --inputs, an npz file of queries, keys and values takes the place
of a run, and no model is made.

The same command again goes on with the layers that are missing. Exit status: 0;
2 for a mistake; 3 if the loss of a fit was not finite; 130 after Ctrl-C.
"""

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from spectraformer_jax import commands
from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import (
  ExactKeys,
  kernel_of,
)
from spectraformer_jax.linearize.layers import fit_layers
from spectraformer_jax.linearize.problem import check_fits
from spectraformer_jax.linearize.records import (
  FittedLayer,
  NonFiniteLossError,
)
from spectraformer_jax.linearize.runs import (
  convert,
  outcome,
  plots,
  report,
  source,
  speed,
)
from spectraformer_jax.linearize.runs.outcome import LayerFigures, Outcome
from spectraformer_jax.linearize.runs.source import Source
from spectraformer_jax.registry import check_int
from spectraformer_jax.seeds import check_seed, make_key
from spectraformer_jax.study.approximation import pair_spec
from spectraformer_jax.study.approximation.exact_flags import (
  add_exact_flags,
  exact_keys_from,
)
from spectraformer_jax.study.approximation.pair_spec import Pair
from spectraformer_jax.typing import FeatureVariables

PROGRAM = "spectraformer_jax.linearize"
RESULTS = "results.csv"
NOT_FINITE = 3
# Defaults of flags that only one kind of source has.
WORKDIR = {
  "examples": source.EXAMPLES,
  "held_out": source.HELD_OUT,
  "step": "best",
}


def make_parser() -> commands.Parser:
  """Makes the parser of the command's flags."""
  parser = commands.Parser(PROGRAM, __doc__)
  flag = parser.add_argument
  flag("--workdir", type=Path, help="of a run of train.py with exact attention")
  flag(
    "--inputs",
    type=Path,
    help="instead of a run: an npz file with layer_0/query, layer_0/key, "
    "layer_0/value [B, T, N, H] ..., as `study approximation` takes it",
  )
  flag("--out", type=Path, required=True, help="folder for all results")
  flag("--overwrite", action="store_true", help="fit anew what --out holds")
  flag(
    "--pair",
    default="prototypes-none",
    help="component-matrix, with options as in 'prototypes(share=1)-none'; "
    "default prototypes-none",
  )
  flag("--num_features", type=int, default=128, help="a head; default 128")
  data_flag = parser.add_argument_group("sequences").add_argument
  data_flag(
    "--examples",
    type=int,
    help="to fit on: training examples of the run, or the first ones of the "
    "file; default 32",
  )
  data_flag(
    "--held_out",
    type=int,
    help="to measure on: dev examples of the run, or the last ones of the "
    "file; default 8, of a file at most a fifth",
  )
  data_flag("--step", help="of the run: best (default), last, or a number")
  data_flag(
    "--causal",
    action="store_true",
    help="of a file: queries see keys up to their own",
  )
  fit_flag = parser.add_argument_group("fit").add_argument
  fit_flag("--steps", type=int, default=200, help="of each layer; default 200")
  fit_flag("--rows", type=int, default=64, help="queries a step; default 64")
  fit_flag("--batch_size", type=int, default=1, help="sequences; default 1")
  fit_flag("--learning_rate", type=float, default=2e-2, help="default 0.02")
  fit_flag("--seed", type=int, default=0, help="of draws; default 0")
  add_exact_flags(parser)
  return parser


def main(argv: Sequence[str]) -> int:
  """Converts, and writes all files; returns the exit status."""
  args = make_parser().parse_args(argv)
  _check(args)
  pair: Pair = args.pair
  size = args.num_features if pair.takes_num_features else None
  feature_map = pair.build(size)
  if args.steps:
    check_fits(feature_map)
  run = None
  if args.workdir:
    run = source.open_run(args.workdir, args.step)
  is_causal = args.causal
  if run is not None:
    is_causal = run.config.train.objective == "causal"
  exact = exact_keys_from(args, is_causal=is_causal)
  if not exact.are_none:
    kernel_of(feature_map.component)
  convert.check_folder(args.out)
  if run is None:
    given = source.read_file(
      args.inputs,
      examples=args.examples,
      held_out=args.held_out,
      is_causal=is_causal,
    )
  else:
    given = source.capture_run(
      run, examples=args.examples, held_out=args.held_out, seed=args.seed
    )
  console = Console()
  try:
    layers = _fit(args, given, feature_map, exact, console)
  except NonFiniteLossError as error:
    print(f"error: {error}", file=sys.stderr)
    return NOT_FINITE
  command = f"python -m {PROGRAM} {shlex.join(argv)}"
  with console.status("measuring"):
    found, landmarks = _measure(args, given, feature_map, exact, layers)
    record = convert.record_of(found, _options(args) | {"seed": args.seed})
    if run is not None:
      found = convert.convert(args.out, run, found, landmarks, record, command)
    convert.write_record(args.out, found, record, command)
  outcome.write_results(args.out / RESULTS, found.layers)
  pictures = plots.draw(found.layers, args.out)
  report.write(args.out, found, command=command, pictures=pictures)
  for line in (*report.warnings(found), report.advise(found)):
    if line:
      console.print(line, highlight=False, markup=False)
  console.print(f"written: {args.out}/{report.REPORT}", highlight=False)
  return 0


def _check(args: argparse.Namespace) -> None:
  """Checks the flags, and fills in defaults that depend on the source.

  Raises:
    ValueError: a number is out of range, or flags do not go together.
  """
  if (args.workdir is None) == (args.inputs is None):
    raise ValueError("one of --workdir and --inputs is needed, not both.")
  if args.inputs and not args.inputs.is_file():
    raise ValueError(f"--inputs: there is no file {str(args.inputs)!r}.")
  if args.workdir:
    for name, default in WORKDIR.items():
      if getattr(args, name) is None:
        setattr(args, name, default)
    if args.causal:
      raise ValueError("--causal is for --inputs only: a run says so itself.")
  elif args.step is not None:
    raise ValueError("--step is for --workdir only.")
  args.pair = pair_spec.parse_pair(args.pair)
  for name in ("num_features", "rows", "batch_size"):
    check_positive_int(f"--{name}", getattr(args, name))
  for name in ("examples", "held_out"):
    if (number := getattr(args, name)) is not None:
      check_positive_int(f"--{name}", number)
  check_int("--steps", args.steps, 0)
  if not args.learning_rate > 0:
    raise ValueError(
      f"--learning_rate must be positive, got {args.learning_rate!r}."
    )
  check_seed("--seed", args.seed)


def _options(args: argparse.Namespace) -> dict[str, Any]:
  """Returns the options of the fit, as JSON values."""
  names = ("steps", "rows", "batch_size", "learning_rate")
  return {name: getattr(args, name) for name in names}


def _fit(
  args: argparse.Namespace,
  given: Source,
  feature_map: FeatureMap,
  exact: ExactKeys,
  console: Console,
) -> list[FittedLayer]:
  """Fits what is missing in the folder; reads the rest."""
  count = len(given.fitted)
  steps = max(args.steps, 1)
  with Progress(console=console) as progress:
    task = progress.add_task("fitting", total=count * steps)
    places = {layer.name: i for i, layer in enumerate(given.fitted)}

    def tell(name: str, step: int) -> None:
      progress.update(
        task, completed=places[name] * steps + step, description=name
      )

    layers = fit_layers(
      given.fitted,
      feature_map=feature_map,
      rng=make_key(args.seed),
      held_out=given.held_out,
      out=args.out,
      overwrite=args.overwrite,
      on_progress=tell,
      is_causal=given.is_causal,
      target=given.target,
      **exact._asdict(),
      **_options(args),
    )
    progress.update(task, completed=count * steps, description="fitted")
  return layers


def _measure(
  args: argparse.Namespace,
  given: Source,
  feature_map: FeatureMap,
  exact: ExactKeys,
  layers: list[FittedLayer],
) -> tuple[Outcome, dict[str, dict[str, FeatureVariables]]]:
  """Measures layers and time; returns the maps to compare with as well."""
  rng = make_key(args.seed)
  landmarks = outcome.landmark_maps(given.is_causal)
  drawn = {
    name: outcome.draw_landmark(landmark, given.fitted, rng)
    for name, landmark in landmarks.items()
  }
  figures = []
  for layer, held_out in zip(layers, given.held_out, strict=True):
    certify = functools.partial(outcome.certify_layer, given, held_out, exact)
    figures.append(
      LayerFigures(
        layer,
        certify(feature_map, layer.variables, layer.start),
        {
          name: certify(landmark, drawn[name][layer.name])
          for name, landmark in landmarks.items()
        },
      )
    )
  speeds = speed.measure(
    given.held_out[0],
    feature_map,
    layers[0].variables,
    exact,
    is_causal=given.is_causal,
  )
  found = Outcome(
    given, args.pair, feature_map, exact, args.steps, figures, speeds, {}, {}
  )
  return found, drawn
