"""Shows the progress of a sweep: as a live table, or as a line per event."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from spectraformer_jax.study.sweep.cells import Cell
from spectraformer_jax.train.run.writers import read_rows

# How many finished and failed cells the live table keeps in view.
RECENT = 6


class Board:
  """Counts cells and shows them; a context manager.

  On a terminal it draws one table on stderr; elsewhere it prints a line per
  event.

  Args:
    cells: all cells that this process has to run.
    folder: of the sweep.
    jobs: number of cells that run side by side.
    live: whether to draw the table; None: draws it if stderr is a terminal.
  """

  def __init__(
    self,
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int,
    live: bool | None = None,
  ) -> None:
    self.folder, self._jobs = folder, jobs
    self._waiting = {cell.name: cell for cell in cells}
    self._elsewhere: set[str] = set()  # waiting for another process
    self._running: dict[str, tuple[Cell, float]] = {}
    self._finished: dict[str, tuple[Cell, dict[str, Any]]] = {}
    self._failed: dict[str, str] = {}
    self._live = None
    if sys.stderr.isatty() if live is None else live:
      console = Console(stderr=True)
      self._live = Live(
        console=console, auto_refresh=False, vertical_overflow="visible"
      )

  @property
  def failed(self) -> Mapping[str, str]:
    """Name of each failed cell -> reason."""
    return self._failed

  def __enter__(self) -> Self:
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._live:
      self.refresh()
      self._live.stop()

  def skip(self, cell: Cell, result: dict[str, Any]) -> None:
    """Counts a cell that had finished before."""
    self._leave(cell)
    self._finished[cell.name] = (cell, result)

  def run_elsewhere(self, cell: Cell) -> None:
    """Marks a waiting cell as running in another process."""
    is_new = cell.name not in self._elsewhere
    self._leave(cell)
    self._waiting[cell.name] = cell
    self._elsewhere.add(cell.name)
    if is_new:
      self._print(f"{cell.name}: another process runs it")

  def start(self, cell: Cell) -> None:
    """Marks a cell as running; does nothing if it is marked already."""
    if cell.name in self._running:
      return
    self._leave(cell)
    self._running[cell.name] = (cell, time.monotonic())
    self._print(f"{cell.name}: started")

  def finish(self, cell: Cell, result: dict[str, Any]) -> None:
    """Marks a cell as finished."""
    self.skip(cell, result)
    self._print(f"{cell.name}: test {result['test/accuracy']:.4f}")

  def fail(self, cell: Cell, reason: str) -> None:
    """Marks a cell as ended without a result."""
    self._leave(cell)
    self._failed[cell.name] = reason
    self._print(f"{cell.name}: FAILED: {reason}")

  def _leave(self, cell: Cell) -> None:
    """Takes a cell out of the waiting and the running cells."""
    self._waiting.pop(cell.name, None)
    self._running.pop(cell.name, None)
    self._elsewhere.discard(cell.name)

  def refresh(self) -> None:
    """Redraws the live table, if there is one."""
    if self._live:
      self._live.update(self._table(), refresh=True)

  def summary(self) -> str:
    """Returns one line of counts, with the time left if it is known."""
    counts = (
      f"{len(self._finished)} finished, {len(self._running)} running, "
      f"{len(self._waiting)} waiting, {len(self._failed)} failed"
    )
    left = self.seconds_left()
    return counts if left is None else f"{counts}, ETA {duration(left)}"

  def seconds_left(self) -> float | None:
    """Estimates the time left; None before the first cell has finished.

    Assumes that a cell needs the mean time of the finished cells of its task,
    or of all tasks if its own task has none.
    """
    if not (self._waiting or self._running):
      return 0.0
    seconds: dict[str, list[float]] = {}
    for cell, result in self._finished.values():
      needed = result["train_seconds"] + (result["compile_seconds"] or 0.0)
      seconds.setdefault(cell.task, []).append(needed)
    if not seconds:
      return None
    means = {task: sum(x) / len(x) for task, x in seconds.items()}
    overall = sum(means.values()) / len(means)
    left = [means.get(cell.task, overall) for cell in self._waiting.values()]
    for cell, start in self._running.values():
      passed = time.monotonic() - start
      left.append(max(0.0, means.get(cell.task, overall) - passed))
    # However many cells run side by side, the longest one takes its time.
    return max(sum(left) / self._jobs, *left)

  def _print(self, event: str) -> None:
    """Prints an event, unless the live table shows it."""
    if not self._live:
      print(f"{event}  ({self.summary()})", file=sys.stderr, flush=True)

  def _table(self) -> Group:
    """Makes the table: running cells, then the latest that ended."""
    table = Table("cell", "state", "step", "dev", "test", box=None)
    for cell, start in self._running.values():
      rows = read_rows(self.folder / cell.name)
      dev = [row["dev/accuracy"] for row in rows if "dev/accuracy" in row]
      table.add_row(
        cell.name,
        duration(time.monotonic() - start),
        str(rows[-1]["step"]) if rows else "-",
        f"{dev[-1]:.3f}" if dev else "-",
      )
    for name in sorted(self._elsewhere):
      table.add_row(name, "in another process")
    for name, (_, result) in list(self._finished.items())[-RECENT:]:
      table.add_row(
        name,
        "finished",
        str(result["step"]),
        f"{result['dev/accuracy_best']:.3f}",
        f"{result['test/accuracy']:.3f}",
        style="green",
      )
    for name, reason in list(self._failed.items())[-RECENT:]:
      table.add_row(name, f"failed: {reason}", style="red")
    return Group(table, Text(self.summary()))


def duration(seconds: float) -> str:
  """Formats hours, minutes and seconds.

  Example:
    >>> duration(59.6), duration(3700)
    ('1:00', '1:01:40')
  """
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"
