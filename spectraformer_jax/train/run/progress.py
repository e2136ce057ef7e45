"""What a person sees while training: a live bar, or plain log lines."""

import sys
import time
from typing import Any

from absl import logging
from rich import progress as bars
from rich.console import Console


class Progress:
  """Shows steps, loss, accuracy, speed and the time left; a context manager.

  On a terminal it is one live bar on stderr; elsewhere (a log file, a pipe) it
  is a log line at most every `interval_seconds`, never a bar.

  Args:
    total: steps of the whole run.
    start: steps that are done already.
    interval_seconds: between plain lines.
    bar: whether to draw a bar; None means if stderr is a terminal.
  """

  def __init__(
    self, total: int, start: int, *, interval_seconds: float, bar: bool | None
  ):
    self._total = total
    self._interval = interval_seconds
    self._values: dict[str, float] = {}
    self._last_line = time.monotonic()
    self._first: tuple[int, float] | None = None
    self._bar = None
    if sys.stderr.isatty() if bar is None else bar:
      self._bar = bars.Progress(
        bars.TextColumn("{task.completed}/{task.total}"),
        bars.BarColumn(bar_width=24),
        bars.TextColumn("{task.fields[text]}"),
        bars.TextColumn("ETA"),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
      )
      self._task = self._bar.add_task(
        "train", total=total, completed=start, text="compiling"
      )

  def __enter__(self):
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exc_info: Any):
    if self._bar:
      self._bar.stop()

  def step(self, step: int) -> None:
    """Moves the bar; cheap, for every step."""
    if self._bar:
      self._bar.update(self._task, completed=step)

  def values(self, step: int, values: dict[str, float]) -> None:
    """Takes new metrics; prints a line if the interval is over."""
    self._values |= values
    self._first = self._first or (step, time.monotonic())
    if self._bar:
      self._bar.update(self._task, completed=step, text=self._text())
    elif time.monotonic() - self._last_line >= self._interval:
      self._last_line = time.monotonic()
      logging.info(
        "step %d/%d  %s%s",
        step,
        self._total,
        self._text(),
        self._time_left(step),
      )

  def line(self, text: str) -> None:
    """Prints a line now, above the bar if there is one."""
    if self._bar:
      self._bar.console.print(text, highlight=False, markup=False)
    else:
      logging.info("%s", text)

  def _text(self) -> str:
    """The latest values."""
    names = {
      "train/loss": "loss {:.3f}",
      "train/accuracy": "acc {:.3f}",
      "dev/accuracy": "dev {:.3f}",
      "train/examples_per_second": "{:.0f} ex/s",
    }
    shown = [
      form.format(self._values[name])
      for name, form in names.items()
      if name in self._values
    ]
    return "  ".join(shown)

  def _time_left(self, step: int) -> str:
    """From the speed since the first values, evaluations included."""
    first_step, first_time = self._first
    if step == first_step:
      return ""
    pace = (time.monotonic() - first_time) / (step - first_step)
    minutes, seconds = divmod(round((self._total - step) * pace), 60)
    return f"  ETA {minutes}:{seconds:02d}"
