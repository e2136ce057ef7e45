"""Runs cells, each in a process of its own, on one machine or on many."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from spectraformer_jax.study.sweep.board import Board
from spectraformer_jax.study.sweep.cells import CELL, LOG, Cell
from spectraformer_jax.train import config as train_config
from spectraformer_jax.train.devices.host_memory import HUGE_PAGES
from spectraformer_jax.train.run import run_folder
from spectraformer_jax.train.run.lock import in_use
from spectraformer_jax.train.run.writers import finished_result

POLL_SECONDS = 0.5

# (workdir, cores) -> the command of a cell's process.
Command = Callable[[Path, str], list[str]]


class Outcome(NamedTuple):
  """How a cell's process ended.

  Attributes:
    status: exit status; None if another process holds the workdir.
    last_line: of the process's log.
  """

  status: int | None
  last_line: str = ""


def cell_command(workdir: Path, cpus: str) -> list[str]:
  """Returns the command that trains the cell of `workdir` on these cores."""
  module = "spectraformer_jax.study.sweep.run_cell"
  return [sys.executable, "-m", module, str(workdir), cpus]


def train_cell(
  workdir: Path,
  cpus: str,
  is_stopped: Callable[[], bool],
  command: Command,
  cwd: Path,
) -> Outcome:
  """Runs the process of a cell to its end.

  Args:
    workdir: holds the cell's description; the log is written there.
    cpus: the cores to stay on, comma-separated; empty for all.
    is_stopped: once it returns True, the process is told to save and stop.
    command: makes the process's command.
    cwd: the folder that the sweep was started in.
  """
  if is_stopped() or in_use(workdir):
    return Outcome(None)
  path = workdir / LOG
  with path.open("a") as log:
    process = subprocess.Popen(
      command(workdir, cpus),
      stdout=log,
      stderr=subprocess.STDOUT,
      stdin=subprocess.PIPE,  # closes when this process ends: the cell stops
      env={**HUGE_PAGES, **os.environ},
      cwd=cwd,
    )
  with process:
    while process.poll() is None:
      if is_stopped():
        process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(POLL_SECONDS)
  lines = path.read_text(errors="replace").splitlines()
  last = next((line.strip() for line in reversed(lines) if line.strip()), "")
  return Outcome(process.returncode, last)


# Workdir of a cell -> future; hands the cell to the workers.
Submit = Callable[[Path], Future[Outcome]]


@contextlib.contextmanager
def threads(jobs: int, command: Command = cell_command) -> Iterator[Submit]:
  """Starts workers on this machine, each with its share of the cores.

  If the block raises an exception, running cells save and stop.

  Args:
    jobs: number of cells that run side by side.
    command: makes the command of a cell's process.
  """
  stop, cwd = threading.Event(), Path.cwd()
  shares: queue.SimpleQueue[str] = queue.SimpleQueue()
  for slot in range(jobs):
    shares.put(share_of_cpus(slot, jobs))

  def train(workdir: Path) -> Outcome:
    cpus = shares.get()
    try:
      return train_cell(workdir, cpus, stop.is_set, command, cwd)
    finally:
      shares.put(cpus)

  with ThreadPoolExecutor(jobs) as executor:
    try:
      yield lambda workdir: executor.submit(train, workdir)
    except BaseException:
      stop.set()
      raise


@contextlib.contextmanager
def dask_workers(
  address: str, command: Command = cell_command
) -> Iterator[Submit]:
  """Uses the workers of a Dask scheduler, on machines that share the folder.

  A cell whose worker dies is given to another worker and resumes there.

  Args:
    address: of the scheduler, host:port.
    command: makes the command of a cell's process.

  Raises:
    ValueError: the package `distributed` is not installed.
    OSError: no scheduler answers.
  """
  try:
    import distributed
  except ImportError:
    raise ValueError(
      "--scheduler needs Dask: pip install 'spectraformer_jax[dask]'."
    ) from None
  cwd = Path.cwd()
  with distributed.Client(address) as client:
    stop = distributed.Event(f"stop-{uuid.uuid4().hex}")
    executor = client.get_executor(pure=False)
    try:
      yield lambda workdir: executor.submit(
        train_cell, workdir, "", stop.is_set, command, cwd
      )
    except BaseException:
      stop.set()
      raise
    finally:
      executor.shutdown()


def share_of_cpus(slot: int, jobs: int) -> str:
  """Returns the cores of one of `jobs` workers, comma-separated; empty: all."""
  if jobs == 1 or not hasattr(os, "sched_getaffinity"):
    return ""
  cpus = sorted(os.sched_getaffinity(0))
  # If there are more jobs than cores, several jobs share a core.
  return ",".join(map(str, cpus[slot::jobs] or [cpus[slot % len(cpus)]]))


def run_cells(
  cells: Sequence[Cell],
  folder: Path,
  workers: contextlib.AbstractContextManager[Submit],
  *,
  jobs: int = 1,
  live: bool | None = None,
) -> dict[str, str]:
  """Runs the cells that have not finished.

  Args:
    cells: in the order in which they start.
    folder: of the sweep; cells' folders are below it.
    workers: from `threads` or `dask_workers`.
    jobs: number of cells that run side by side, to estimate the time left.
    live: see `Board`.

  Returns:
    Name of each cell that failed -> reason.
  """
  folder = folder.absolute()
  board = Board(cells, folder, jobs=jobs, live=live)
  with board, workers as submit:
    waiting = cells
    while waiting := [c for c in waiting if _prepare(c, folder, board)]:
      # Cells that other processes run are checked again after all free cells.
      busy = [cell for cell in waiting if in_use(folder / cell.name)]
      for cell in busy:
        board.run_elsewhere(cell)
      futures = {
        submit(folder / cell.name): cell for cell in waiting if cell not in busy
      }
      waiting = busy
      for future in _as_completed(futures, folder, board):
        if not _conclude(futures[future], future, board):
          waiting.append(futures[future])
      if waiting:
        time.sleep(POLL_SECONDS)
  return dict(board.failed)


def _as_completed(
  futures: dict[Future[Outcome], Cell], folder: Path, board: Board
) -> Iterator[Future[Outcome]]:
  """Yields each future as its cell ends; meanwhile shows the running cells."""
  pending = set(futures)
  while pending:
    done, pending = wait(
      pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED
    )
    for future in pending:
      # A Dask future does not say whether it runs; the lock of its cell does.
      if future.running() or in_use(folder / futures[future].name):
        board.start(futures[future])
    # In the order of the sweep, even if several ended at once.
    yield from (future for future in futures if future in done)
    board.refresh()


def _prepare(cell: Cell, folder: Path, board: Board) -> bool:
  """Whether the cell has to run; if so, writes its description.

  A cell whose config is wrong or has changed, or whose run has diverged, fails.
  """
  workdir = folder / cell.name
  try:
    run_folder.check_config(workdir, train_config.to_dict(cell.config()))
    result = result_of(cell, workdir)
    if result and result.get("diverged"):
      raise ValueError(result["diverged"])
  except ValueError as error:
    board.fail(cell, str(error))
    return False
  if result:
    board.skip(cell, result)
    return False
  run_folder.write_text(workdir / CELL, cell.to_json() + "\n")
  return True


def result_of(cell: Cell, workdir: Path) -> dict[str, Any] | None:
  """Returns the last row of a finished cell's metrics; None if unfinished."""
  config = train_config.to_dict(cell.config())
  return finished_result(workdir, config["train"]["num_steps"])


def _conclude(cell: Cell, future: Future[Outcome], board: Board) -> bool:
  """Shows how a cell ended; returns False if another process runs it."""
  try:
    status, last_line = future.result()
  except Exception as error:  # such as a Dask task whose workers kept dying
    board.fail(cell, f"{type(error).__name__}: {error}")
    return True
  if status is None:
    board.run_elsewhere(cell)
    return False
  result = result_of(cell, board.folder / cell.name)
  if result and status == 0:
    board.finish(cell, result)
    return True
  reason = f"signal {-status}" if status < 0 else f"status {status}"
  board.fail(cell, f"{reason}: {last_line}" if last_line else reason)
  return True
