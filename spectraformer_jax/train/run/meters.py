"""Sums metrics over steps, measures training time, and keeps a record."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, TypedDict

import jax

from spectraformer_jax.train.devices.parallel import DataParallelStep
from spectraformer_jax.train.step.steps import Sums

# Number of steps that may be dispatched and not yet computed: enough to keep a
# device busy, few enough for their batches to fit in memory.
RUN_AHEAD = 8


class Evaluation(TypedDict):
  """Mean loss and accuracy on the dev split after a step."""

  step: int
  loss: float
  accuracy: float


@dataclasses.dataclass
class Record:
  """The JSON values that a checkpoint holds beside the state.

  Attributes:
    data: position in the training data, of `data.Batches.state`.
    window: sums of loss, hits and weights since the last row of metrics.
    dev: the last evaluation on the dev split; None before the first.
    best: the best evaluation on the dev split; None before the first.
    train_seconds: time of training, without compiling, evaluating and saving.
    row_seconds: `train_seconds` at the last row of metrics.
    compile_seconds: time of compiling.
    skipped: number of steps that were skipped, since their loss or gradient was
      not finite.
    skipped_in_a_row: number of steps skipped since the last one that was not.
  """

  data: dict[str, Any] = dataclasses.field(default_factory=dict)
  window: list[float] = dataclasses.field(default_factory=lambda: [0.0] * 3)
  dev: Evaluation | None = None
  best: Evaluation | None = None
  train_seconds: float = 0.0
  row_seconds: float = 0.0
  compile_seconds: float = 0.0
  skipped: int = 0
  skipped_in_a_row: int = 0


class Window:
  """Sums metrics over steps; `collect` fetches them from the device.

  Args:
    sums: loss, hits and weight to start from.

  Attributes:
    sums: loss, hits and weight of the collected steps.
  """

  def __init__(self, sums: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
    self.sums = list(sums)
    self._pending: list[Sums] = []

  def add(self, sums: Sums) -> None:
    """Adds a step; waits for an earlier one if too many are under way."""
    self._pending.append(sums)
    if len(self._pending) > RUN_AHEAD:
      jax.block_until_ready(self._pending[-RUN_AHEAD])

  def collect(self) -> None:
    """Waits for all steps that were added, and sums their metrics."""
    for sums in jax.device_get(self._pending):
      added = sums.loss, sums.correct, sums.weight
      self.sums = [a + float(b) for a, b in zip(self.sums, added, strict=True)]
    self._pending.clear()

  def means(self) -> dict[str, float]:
    """Returns weighted means over the collected steps; {} without weight."""
    loss, correct, weight = self.sums
    if not weight:
      return {}
    return {"loss": loss / weight, "accuracy": correct / weight}

  @property
  def weight(self) -> float:
    """The sum of weights, which is the number of examples."""
    return self.sums[2]

  def reset(self) -> None:
    """Sets all sums to 0."""
    self.sums = [0.0] * 3


class Clock:
  """Adds the time of training, and that of compiling, to a record.

  Args:
    record: its seconds are updated.
    *steps: their `compile_seconds` do not count as training.
  """

  def __init__(self, record: Record, *steps: DataParallelStep) -> None:
    self._record = record
    self._steps = steps
    self._compile_seconds = 0.0
    self.start()

  def start(self) -> None:
    """Restarts the training timer; records what was compiled since `stop`."""
    self._since = time.perf_counter()
    self._add_compilation()

  def stop(self) -> None:
    """Adds the time since `start` to the record, without that of compiling."""
    elapsed = time.perf_counter() - self._since
    self._record.train_seconds += elapsed - self._add_compilation()

  def rate(self, examples: float) -> float:
    """Returns examples per second of training since the last call."""
    seconds = self._record.train_seconds - self._record.row_seconds
    self._record.row_seconds = self._record.train_seconds
    return examples / seconds

  def _add_compilation(self) -> float:
    """Records the time of compiling since the last call, and returns it."""
    total = sum(step.compile_seconds for step in self._steps)
    added, self._compile_seconds = total - self._compile_seconds, total
    self._record.compile_seconds += added
    return added
