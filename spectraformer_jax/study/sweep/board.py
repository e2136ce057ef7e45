"""What a person sees while a sweep runs: a live table, or a line per event."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

  On a terminal it is one table on stderr that is drawn anew; elsewhere a line
  per event.

  Args:
    cells: all of this process's share.
    folder: of the sweep.
    jobs: how many run side by side.
    live: whether to draw the table; None means if stderr is a terminal.
  """

  def __init__(
    self,
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int,
    live: bool | None = None,
  ):
    self.folder, self._jobs = folder, jobs
    self._waiting = {cell.name: cell for cell in cells}
    self._running: dict[str, tuple[Cell, float]] = {}
    self._finished: dict[str, tuple[Cell, dict[str, Any]]] = {}
    self._failed: dict[str, str] = {}
    self._elsewhere: set[str] = set()  # of those that wait
    self._live = None
    if sys.stderr.isatty() if live is None else live:
      self._live = Live(
        console=Console(stderr=True),
        auto_refresh=False,
        vertical_overflow="visible",
      )

  @property
  def failed(self) -> Mapping[str, str]:
    """Name of each failed cell -> why."""
    return self._failed

  def __enter__(self) -> "Board":
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *exc_info: Any) -> None:
    if self._live:
      self.refresh()
      self._live.stop()

  def skip(self, cell: Cell, result: dict[str, Any]) -> None:
    """The cell had finished before."""
    del self._waiting[cell.name]
    self._finished[cell.name] = (cell, result)

  def run_elsewhere(self, cell: Cell) -> None:
    """Another process runs the cell; it waits until that has ended."""
    self._leave(cell)
    self._waiting[cell.name] = cell
    if cell.name not in self._elsewhere:
      self._elsewhere.add(cell.name)
      self._line(f"{cell.name}: another process runs it")

  def start(self, cell: Cell) -> None:
    """The cell has begun; does nothing if it is known to."""
    if cell.name in self._running:
      return
    self._leave(cell)
    self._elsewhere.discard(cell.name)
    self._running[cell.name] = (cell, time.monotonic())
    self._line(f"{cell.name}: started")

  def finish(self, cell: Cell, result: dict[str, Any]) -> None:
    """The cell has its result."""
    self._leave(cell)
    self._elsewhere.discard(cell.name)
    self._finished[cell.name] = (cell, result)
    self._line(f"{cell.name}: test {result['test/accuracy']:.4f}")

  def fail(self, cell: Cell, why: str) -> None:
    """The cell ended without a result."""
    self._leave(cell)
    self._elsewhere.discard(cell.name)
    self._failed[cell.name] = why
    self._line(f"{cell.name}: FAILED: {why}")

  def _leave(self, cell: Cell) -> None:
    """Takes the cell out of those that wait or run."""
    self._waiting.pop(cell.name, None)
    self._running.pop(cell.name, None)

  def refresh(self) -> None:
    """Draws the table anew."""
    if self._live:
      self._live.update(self._table(), refresh=True)

  def summary(self) -> str:
    """One line of counts, and the time left if it can be told."""
    counts = (
      f"{len(self._finished)} finished, {len(self._running)} running, "
      f"{len(self._waiting)} waiting, {len(self._failed)} failed"
    )
    left = self.seconds_left()
    return counts if left is None else f"{counts}, ETA {duration(left)}"

  def seconds_left(self) -> float | None:
    """From the cells that have finished, those of the same task first."""
    seconds: dict[str, list[float]] = {}
    for cell, result in self._finished.values():
      took = result["train_seconds"] + (result["compile_seconds"] or 0.0)
      seconds.setdefault(cell.task, []).append(took)
    if not (self._waiting or self._running):
      return 0.0
    if not seconds:
      return None
    means = {task: sum(x) / len(x) for task, x in seconds.items()}
    overall = sum(means.values()) / len(means)
    left = [means.get(cell.task, overall) for cell in self._waiting.values()]
    for cell, since in self._running.values():
      took = time.monotonic() - since
      left.append(max(0.0, means.get(cell.task, overall) - took))
    return max(sum(left) / self._jobs, *left)

  def _line(self, text: str) -> None:
    """An event; the table shows it already."""
    if not self._live:
      print(f"{text}  ({self.summary()})", file=sys.stderr, flush=True)

  def _table(self) -> Group:
    """Running cells, then the latest that ended."""
    table = Table("cell", "state", "step", "dev", "test", box=None)
    for cell, since in self._running.values():
      rows = read_rows(self.folder / cell.name)
      dev = [row["dev/accuracy"] for row in rows if "dev/accuracy" in row]
      table.add_row(
        cell.name,
        duration(time.monotonic() - since),
        str(rows[-1]["step"]) if rows else "-",
        f"{dev[-1]:.3f}" if dev else "-",
        "",
      )
    for name in sorted(self._elsewhere):
      table.add_row(name, "in another process", "", "", "")
    for name, (_, result) in list(self._finished.items())[-RECENT:]:
      accuracy = (
        f"{result['dev/accuracy_best']:.3f}",
        f"{result['test/accuracy']:.3f}",
      )
      table.add_row(
        name, "finished", str(result["step"]), *accuracy, style="green"
      )
    for name, why in list(self._failed.items())[-RECENT:]:
      table.add_row(name, f"failed: {why}", "", "", "", style="red")
    return Group(table, Text(self.summary()))


def duration(seconds: float) -> str:
  """Hours, minutes and seconds.

  Example:
    >>> duration(59.6), duration(3700)
    ('1:00', '1:01:40')
  """
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"
