"""Counting: metrics over steps, seconds spent, and what is saved of both."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from spectraformer_jax.train.devices.parallel import DataParallelStep
from spectraformer_jax.train.step.steps import Sums

# Steps that may be dispatched and not yet computed: enough to keep a device
# busy, few enough for their batches to fit.
RUN_AHEAD = 8


@dataclasses.dataclass
class Record:
  """What a checkpoint holds beside the state, as JSON values.

  Attributes:
    data: position in the training data.
    window: sums of loss, hits and weights since the last row of metrics.
    dev: the last evaluation on the dev set.
    best: the best one; both are step, accuracy and loss, or None.
    train_seconds: spent training so far, without compiling, evaluating, saving.
    row_seconds: `train_seconds` at the last row of metrics.
    compile_seconds: spent compiling so far.
    skipped: steps that were not made because of numbers that are not finite.
    skipped_in_a_row: those among them since the last step that was made.
  """

  data: dict[str, Any]
  window: list[float] = dataclasses.field(default_factory=lambda: [0.0] * 3)
  dev: dict[str, float] | None = None
  best: dict[str, float] | None = None
  train_seconds: float = 0.0
  row_seconds: float = 0.0
  compile_seconds: float = 0.0
  skipped: int = 0
  skipped_in_a_row: int = 0


class Window:
  """Sums over some steps; fetched from the device only when asked for.

  Args:
    sums: loss, hits and weight to start from.
  """

  def __init__(self, sums: Sequence[float] = (0.0, 0.0, 0.0)):
    self.sums = list(sums)
    self._pending: list[Sums] = []

  def add(self, sums: Sums) -> None:
    """Counts one step; waits for an old one if too many are under way."""
    self._pending.append(sums)
    if len(self._pending) > RUN_AHEAD:
      jax.block_until_ready(self._pending[-RUN_AHEAD])

  def collect(self) -> None:
    """Waits for all steps that were added."""
    for sums in jax.device_get(self._pending):
      added = sums.loss, sums.correct, sums.weight
      self.sums = [a + float(b) for a, b in zip(self.sums, added, strict=True)]
    self._pending.clear()

  def means(self) -> dict[str, float]:
    """Weighted mean loss and accuracy of the collected steps, if any count."""
    loss, correct, weight = self.sums
    if not weight:
      return {}
    return {"loss": loss / weight, "accuracy": correct / weight}

  @property
  def weight(self) -> float:
    """How many examples were counted."""
    return self.sums[2]

  def reset(self) -> None:
    """Starts anew."""
    self.sums = [0.0] * 3


class Clock:
  """Adds the seconds of training, and of compiling, to a record."""

  def __init__(self, record: Record, *compiling: DataParallelStep):
    self._record = record
    self._compiling = compiling
    self._compiled = 0.0
    self.start()

  def start(self) -> None:
    """Training goes on."""
    self._since = time.perf_counter()
    self._add_compilation()

  def stop(self) -> None:
    """Something else than training comes next."""
    elapsed = time.perf_counter() - self._since
    self._record.train_seconds += elapsed - self._add_compilation()

  def rate(self, examples: float) -> float:
    """Examples per second since the last row, whose end this marks."""
    seconds = self._record.train_seconds - self._record.row_seconds
    self._record.row_seconds = self._record.train_seconds
    return examples / seconds

  def _add_compilation(self) -> float:
    """Records what was compiled since the last call; returns its seconds."""
    total = sum(step.compile_seconds for step in self._compiling)
    new, self._compiled = total - self._compiled, total
    self._record.compile_seconds += new
    return new
