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
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spectraformer_jax.registry import nearest
from spectraformer_jax.study.sweep import cells as spec
from spectraformer_jax.study.sweep.board import Board
from spectraformer_jax.study.sweep.cells import Cell, Sweep
from spectraformer_jax.train import config as train_config
from spectraformer_jax.train import workdir as files
from spectraformer_jax.train.host_memory import HUGE_PAGES
from spectraformer_jax.train.lock import in_use
from spectraformer_jax.train.writers import read_rows, result_row

INTERRUPTED = 130
POLL_SECONDS = 0.2
REFRESH_SECONDS = 2.0

StartCell = Callable[[Cell, Path, str], subprocess.Popen]


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
      finished = result_row(read_rows(folder / cell.name))
      print(f"{'finished' if finished else 'to do':9} {cell.name}")
    return 0
  try:
    failed = run_cells(cells, folder, jobs=args.jobs)
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


def start_cell(cell: Cell, workdir: Path, cpus: str) -> subprocess.Popen:
  """Starts the cell's process; what it prints goes to its log."""
  with (workdir / spec.LOG).open("a") as log:
    module = "spectraformer_jax.study.sweep.run_cell"
    return subprocess.Popen(
      [sys.executable, "-m", module, str(workdir), cpus],
      stdout=log,
      stderr=subprocess.STDOUT,
      stdin=subprocess.PIPE,  # its end tells the cell that the sweep has died
      env={**HUGE_PAGES, **os.environ},
    )


def run_cells(
  cells: Sequence[Cell],
  folder: Path,
  *,
  jobs: int = 1,
  live: bool | None = None,
  start: StartCell = start_cell,
) -> dict[str, str]:
  """Runs the cells that have not finished.

  Args:
    cells: in this order.
    folder: of the sweep; cells' folders are below it.
    jobs: how many side by side; each gets its share of the cores.
    live: see `Board`.
    start: starts the process of a cell.

  Returns:
    Name of each cell that failed -> why.
  """
  board = Board(cells, folder, jobs=jobs, live=live)
  running: dict[int, tuple[Cell, subprocess.Popen]] = {}
  refreshed = 0.0
  with board:
    queue = [cell for cell in cells if _prepare(cell, folder, board)]
    try:
      while queue or running:
        for slot in range(jobs):
          if slot not in running and (cell := _next(queue, folder, board)):
            board.start(cell)
            process = start(cell, folder / cell.name, share_of_cpus(slot, jobs))
            running[slot] = (cell, process)
        for slot, (cell, process) in list(running.items()):
          if process.poll() is not None:
            del running[slot]
            _conclude(cell, folder / cell.name, process.returncode, board)
        if time.monotonic() - refreshed > REFRESH_SECONDS:
          refreshed = time.monotonic()
          board.refresh()
        time.sleep(POLL_SECONDS)
    finally:
      for _, process in running.values():
        process.send_signal(signal.SIGTERM)
      for _, process in running.values():
        process.wait()
  return dict(board.failed)


def share_of_cpus(slot: int, jobs: int) -> str:
  """Cores of the slot, comma-separated; empty for all of them."""
  if jobs == 1 or not hasattr(os, "sched_getaffinity"):
    return ""
  cpus = sorted(os.sched_getaffinity(0))
  # More jobs than cores share them.
  return ",".join(map(str, cpus[slot::jobs] or [cpus[slot % len(cpus)]]))


def _prepare(cell: Cell, folder: Path, board: Board) -> bool:
  """Whether the cell is to run; describes it in its folder if so."""
  workdir = folder / cell.name
  try:
    files.check_config(workdir, train_config.to_dict(cell.config()))
  except ValueError as error:
    board.fail(cell, str(error))
    return False
  result = result_row(read_rows(workdir))
  if result:
    board.skip(cell, result)
    return False
  files.write_text(workdir / spec.CELL, cell.to_json() + "\n")
  return True


def _next(queue: list[Cell], folder: Path, board: Board) -> Cell | None:
  """Takes the first cell that no other process runs or has finished."""
  for cell in list(queue):
    workdir = folder / cell.name
    if in_use(workdir):
      board.run_elsewhere(cell)
      continue
    queue.remove(cell)
    result = result_row(read_rows(workdir))
    if not result:
      return cell
    board.skip(cell, result)
  return None


def _conclude(cell: Cell, workdir: Path, status: int, board: Board) -> None:
  """What became of a cell whose process has ended."""
  result = result_row(read_rows(workdir))
  if result and status == 0:
    board.finish(cell, result)
    return
  log = (workdir / spec.LOG).read_text(errors="replace").splitlines()
  last = next((line.strip() for line in reversed(log) if line.strip()), "")
  why = f"signal {-status}" if status < 0 else f"status {status}"
  board.fail(cell, f"{why}: {last}" if last else why)
