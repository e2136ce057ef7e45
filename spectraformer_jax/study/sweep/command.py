"""Trains tasks x attentions x seeds, cell by cell; can be stopped and resumed.

  python -m spectraformer_jax.study sweep configs/sweeps/small.py --out=runs/s
  python -m spectraformer_jax.study sweep --tasks digits listops:quick \
    --attentions oprf-orf softmax --seeds 0 1 2 --set train.num_steps=500 \
    --vary feature_map.num_features=64,128 --out=runs/mine

Run the same command again to continue: it skips finished cells and resumes the
others from their checkpoints. Flags narrow or change what a sweep file says.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from spectraformer_jax import commands
from spectraformer_jax.registry import nearest
from spectraformer_jax.study.sweep import cells as sweep_cells
from spectraformer_jax.study.sweep.cells import Cell, Sweep
from spectraformer_jax.study.sweep.execute import (
  dask_workers,
  result_of,
  run_cells,
  threads,
)
from spectraformer_jax.train.config import check_key

T = TypeVar("T")


def make_parser() -> commands.Parser:
  """Makes the parser of the command's flags."""
  parser = commands.Parser("spectraformer_jax.study sweep", __doc__)
  flag = parser.add_argument
  flags = functools.partial(parser.add_argument, nargs="+", default=())
  flag("file", nargs="?", help="a file of configs/sweeps")
  flag("--out", required=True, type=Path, help="folder of the sweep")
  flags("--tasks", help="X or X:variant of configs/X.py, or the file's labels")
  flags("--attentions", help="pairs, baseline attentions, or the file's labels")
  flags("--seeds", type=int)
  flags("--set", help="KEY=VALUE: overrides of every cell's config")
  flags("--vary", help="KEY=VALUE,VALUE: more axes of the sweep")
  flag(
    "--jobs", type=int, default=1, help="cells side by side; share the cores"
  )
  flag("--scheduler", help="HOST:PORT of Dask, whose workers run the cells")
  flag("--shard", default="1/1", help="i/n: every n-th cell, from the i-th")
  flag("--list", action="store_true", help="print the cells and their state")
  return parser


def main(argv: Sequence[str]) -> int:
  """Runs the command; returns 1 if a cell failed."""
  args = make_parser().parse_args(argv)
  cells = sweep_cells.expand(make_sweep(args))
  _check_one(cells)
  cells = shard(cells, args.shard)
  if args.jobs < 1:
    raise ValueError(f"--jobs must be at least 1, got {args.jobs}.")
  if args.list:
    for cell in cells:
      finished = result_of(cell, args.out / cell.name)
      print(f"{'finished' if finished else 'to do':9} {cell.name}")
    return 0
  workers = threads(args.jobs)
  if args.scheduler:
    workers = dask_workers(args.scheduler)
  failed = run_cells(cells, args.out, workers, jobs=args.jobs)
  for name, reason in failed.items():
    print(f"failed: {name}: {reason}", file=sys.stderr)
  print(
    f"{len(cells) - len(failed)} of {len(cells)} cells have finished. Compare:"
    f" python -m spectraformer_jax.study table {args.out} --out=DIR"
  )
  return 1 if failed else 0


def _check_one(cells: Sequence[Cell]) -> None:
  """Raises ValueError if no cell has a valid config, as for a wrong flag."""
  errors = []
  for cell in cells:
    try:
      cell.config()
      return
    except ValueError as error:
      errors.append(error)
  if errors:
    raise errors[0]


def make_sweep(args: argparse.Namespace) -> Sweep:
  """Makes the sweep of the file and the flags; flags win.

  Raises:
    ValueError: neither a file nor tasks and attentions are given, or a flag
      cannot be read.
  """
  if not (args.file or (args.tasks and args.attentions)):
    raise ValueError("give a sweep file, or --tasks and --attentions.")
  sweep = sweep_cells.load_sweep(args.file) if args.file else Sweep({}, ())
  tasks, attentions = sweep.tasks, sweep.attentions
  if args.tasks:
    tasks = {
      task.replace(":", "-"): sweep.tasks.get(task) or _experiment(task, sweep)
      for task in args.tasks
    }
  if args.attentions:
    known = attentions if isinstance(attentions, Mapping) else {}
    attentions = {name: known.get(name, {}) for name in args.attentions}
  given = dict(map(_split, args.set))
  given = {key: sweep_cells.parse_value(given[key]) for key in given}
  varied = {
    key: [sweep_cells.parse_value(value) for value in values.split(",")]
    for key, values in map(_split, args.vary)
  }
  return dataclasses.replace(
    sweep,
    tasks=tasks,
    attentions=attentions,
    seeds=args.seeds or sweep.seeds,
    task_overrides={
      task: {**sweep.task_overrides.get(task, {}), **given} for task in tasks
    },
    vary={**sweep.vary, **varied},
  )


def _experiment(task: str, sweep: Sweep) -> str:
  """Returns "configs/listops.py:quick" for "listops:quick"."""
  name, colon, variant = task.partition(":")
  path = f"configs/{name}.py"
  if not Path(path).is_file():
    known = {*sweep.tasks, *(p.stem for p in Path("configs").glob("*.py"))}
    raise ValueError(
      f"--tasks: there is no config file {path!r} for {task!r}."
      f"{nearest(task, known - {'common'})}"
    )
  return f"{path}{colon}{variant}"


def _split(text: str) -> tuple[str, str]:
  """Returns key and value of ``key=value``; the key must be one of a config."""
  key, equals, value = text.partition("=")
  if not equals:
    raise ValueError(f"{text!r} must be KEY=VALUE.")
  check_key(key)
  return key, value


def shard(cells: Sequence[T], share: str) -> list[T]:
  """Returns the share "i/n" of the cells; all n shares hold each cell once.

  Example:
    >>> shard("abcde", "2/3")
    ['b', 'e']
  """
  index, slash, count = share.partition("/")
  if not (slash and index.isdigit() and count.isdigit()):
    raise ValueError(f"--shard must be i/n, like 1/4, got {share!r}.")
  if not 1 <= int(index) <= int(count):
    raise ValueError(f"--shard {share}: i must be from 1 to n.")
  return list(cells[int(index) - 1 :: int(count)])
