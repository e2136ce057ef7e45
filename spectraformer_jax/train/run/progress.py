"""Progress of a run on the terminal: a live bar, or plain log lines."""

import logging as python_logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from absl import logging
from rich import progress as bars
from rich.console import Console


def quiet_other_packages() -> None:
  """Logs messages of other packages, such as orbax, only from WARNING up."""
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno > python_logging.INFO
      or "spectraformer_jax" in Path(record.pathname).parts
    )
  )


class Interval:
  """Limits how often something is done.

  Args:
    seconds: between two times that `is_over` is true.
  """

  def __init__(self, seconds: float) -> None:
    self._seconds = seconds
    self._start = time.monotonic()

  def is_over(self) -> bool:
    """Whether the interval is over; if so, the next one starts."""
    now = time.monotonic()
    if now - self._start < self._seconds:
      return False
    self._start = now
    return True


class Progress:
  """Shows steps, loss, accuracy, speed and the time left; a context manager.

  On a terminal it draws one live bar on stderr; elsewhere (a log file, a pipe)
  it logs a line at most every `interval_seconds`.

  Args:
    total: steps of the whole run.
    start: steps that are done already.
    interval_seconds: between plain lines.
    bar: whether to draw a bar; None draws one if stderr is a terminal.
  """

  def __init__(
    self, total: int, start: int, *, interval_seconds: float, bar: bool | None
  ) -> None:
    self._total = total
    self._interval = Interval(interval_seconds)
    self._values: dict[str, float] = {}
    # Step and time of the first metrics.
    self._first: tuple[int, float] | None = None
    self._bar: bars.Progress | None = None
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

  def __enter__(self) -> "Progress":
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._bar:
      self._bar.stop()

  def step(self, step: int) -> None:
    """Moves the bar; cheap enough for every step."""
    if self._bar:
      self._bar.update(self._task, completed=step)

  def values(self, step: int, values: Mapping[str, float]) -> None:
    """Shows new metrics; without a bar, at most once in an interval."""
    self._values |= values
    self._first = self._first or (step, time.monotonic())
    if self._bar:
      self._bar.update(self._task, completed=step, text=self._text())
    elif self._interval.is_over():
      text, left = self._text(), self._time_left(step, *self._first)
      logging.info("step %d/%d  %s%s", step, self._total, text, left)

  def line(self, text: str) -> None:
    """Prints a line now, above the bar if there is one."""
    if self._bar:
      self._bar.console.print(text, highlight=False, markup=False)
    else:
      logging.info("%s", text)

  def _text(self) -> str:
    """Returns the latest metrics as text."""
    forms = {
      "train/loss": "loss {:.3f}",
      "train/accuracy": "acc {:.3f}",
      "dev/accuracy": "dev {:.3f}",
      "train/examples_per_second": "{:.0f} ex/s",
    }
    return "  ".join(
      form.format(self._values[name])
      for name, form in forms.items()
      if name in self._values
    )

  def _time_left(self, step: int, first_step: int, first_time: float) -> str:
    """Returns the time left at the speed since the first metrics, as text."""
    if step == first_step:
      return ""
    pace = (time.monotonic() - first_time) / (step - first_step)
    minutes, seconds = divmod(round((self._total - step) * pace), 60)
    return f"  ETA {minutes}:{seconds:02d}"
