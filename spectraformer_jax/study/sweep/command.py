"""Trains tasks x attentions x seeds, resumable, cell by cell.

  python -m spectraformer_jax.study sweep configs/sweeps/small.py --out=runs/s
  python -m spectraformer_jax.study sweep --tasks digits listops:quick \
    --attentions oprf-orf softmax --seeds 0 1 2 --set train.num_steps=500 \
    --vary feature_map.num_features=64,128 --out=runs/mine

The same command again goes on: finished cells are skipped, the others resume
from their checkpoints. Flags narrow or change what a file says.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectraformer_jax.registry import nearest
from spectraformer_jax.study.sweep import cells as spec
from spectraformer_jax.study.sweep.cells import Cell, Sweep
from spectraformer_jax.study.sweep.execute import (
  dask_workers,
  result_of,
  run_cells,
  threads,
)
from spectraformer_jax.train import config as train_config

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""
  parser.add_argument("file", nargs="?", help="a file of configs/sweeps")
  parser.add_argument("--out", required=True, help="folder of the sweep")
  parser.add_argument(
    "--tasks",
    nargs="+",
    default=(),
    metavar="TASK",
    help="X or X:variant of configs/X.py, or labels of the file",
  )
  parser.add_argument(
    "--attentions",
    nargs="+",
    default=(),
    metavar="NAME",
    help="pairs or baselines, or labels of the file",
  )
  parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
  parser.add_argument(
    "--set",
    nargs="+",
    default=(),
    metavar="KEY=VALUE",
    help="overrides of every cell's config",
  )
  parser.add_argument(
    "--vary",
    nargs="+",
    default=(),
    metavar="KEY=VALUE,VALUE",
    help="more axes of the sweep",
  )
  parser.add_argument(
    "--jobs", type=int, default=1, help="cells side by side; shares the cores"
  )
  parser.add_argument(
    "--scheduler",
    metavar="HOST:PORT",
    help="of Dask, whose workers run the cells in place of this machine",
  )
  parser.add_argument(
    "--shard", default="1/1", help="i/n: every n-th cell, from the i-th"
  )
  parser.add_argument(
    "--list", action="store_true", help="print the cells and their state"
  )


def run(args: argparse.Namespace) -> int:
  """Runs the command; 1 if a cell failed."""
  cells = spec.expand(make_sweep(args))
  _check_one(cells)
  cells = shard(cells, args.shard)
  if args.jobs < 1:
    raise ValueError(f"--jobs must be at least 1, got {args.jobs}.")
  folder = Path(args.out)
  if args.list:
    for cell in cells:
      finished = result_of(cell, folder / cell.name)
      print(f"{'finished' if finished else 'to do':9} {cell.name}")
    return 0
  workers = threads(args.jobs)
  if args.scheduler:
    workers = dask_workers(args.scheduler)
  try:
    failed = run_cells(cells, folder, workers, jobs=args.jobs)
  except KeyboardInterrupt:
    print("\nstopped; the same command goes on from here", file=sys.stderr)
    return INTERRUPTED
  for name, why in failed.items():
    print(f"failed: {name}: {why}", file=sys.stderr)
  print(
    f"{len(cells) - len(failed)} of {len(cells)} cells have finished. Compare:"
    f" python -m spectraformer_jax.study table {folder} --out=DIR"
  )
  return 1 if failed else 0


def _check_one(cells: Sequence[Cell]) -> None:
  """ValueError if no cell at all has a valid config: then a flag is wrong."""
  wrong = None
  for cell in cells:
    try:
      cell.config()
    except ValueError as error:
      wrong = wrong or error
    else:
      return
  if wrong:
    raise wrong


def make_sweep(args: argparse.Namespace) -> Sweep:
  """The sweep of the file and the flags.

  Raises:
    ValueError: neither, or a flag that cannot be read.
  """
  if not (args.file or (args.tasks and args.attentions)):
    raise ValueError("give a sweep file, or --tasks and --attentions.")
  sweep = spec.load_sweep(args.file) if args.file else Sweep({}, ())
  changes: dict[str, Any] = {}
  if args.tasks:
    changes["tasks"] = {
      task.replace(":", "-"): sweep.tasks.get(task) or _experiment(task, sweep)
      for task in args.tasks
    }
    changes["task_overrides"] = {
      task: overrides
      for task, overrides in sweep.task_overrides.items()
      if task in changes["tasks"]
    }
  if args.attentions:
    known = sweep.attentions
    known = known if isinstance(known, dict) else {}
    changes["attentions"] = {
      name: known.get(name, {}) for name in args.attentions
    }
  if args.seeds:
    changes["seeds"] = args.seeds
  # A flag wins over what the file says, of a task too.
  given = {key: spec.parse_value(value) for key, value in map(_split, args.set)}
  tasks = changes.get("tasks", sweep.tasks)
  per_task = changes.get("task_overrides", sweep.task_overrides)
  changes["task_overrides"] = {
    task: {**per_task.get(task, {}), **given} for task in tasks
  }
  changes["vary"] = {
    **sweep.vary,
    **{
      key: [spec.parse_value(value) for value in values.split(",")]
      for key, values in map(_split, args.vary)
    },
  }
  return dataclasses.replace(sweep, **changes)


def _experiment(task: str, sweep: Sweep) -> str:
  """``configs/listops.py:quick`` of "listops:quick"."""
  name, colon, variant = task.partition(":")
  path = f"configs/{name}.py"
  if not Path(path).is_file():
    known = {*sweep.tasks, *(p.stem for p in Path("configs").glob("*.py"))}
    known -= {"common"}
    raise ValueError(
      f"--tasks: there is no config file {path!r} for {task!r}."
      f"{nearest(task, known)}"
    )
  return f"{path}{colon}{variant}"


def _split(text: str) -> tuple[str, str]:
  """Key and value of ``key=value``."""
  key, equals, value = text.partition("=")
  if not equals:
    raise ValueError(f"{text!r} must be KEY=VALUE.")
  train_config.check_key(key)
  return key, value


def shard(cells: Sequence[Cell], which: str) -> list[Cell]:
  """The i-th of n shares; together they are all cells, each once.

  Example:
    >>> shard("abcde", "2/3")
    ['b', 'e']
  """
  index, slash, count = which.partition("/")
  if not (slash and index.isdigit() and count.isdigit()):
    raise ValueError(f"--shard must be i/n, like 1/4, got {which!r}.")
  if not 1 <= int(index) <= int(count):
    raise ValueError(f"--shard {which}: i must be from 1 to n.")
  return list(cells[int(index) - 1 :: int(count)])
