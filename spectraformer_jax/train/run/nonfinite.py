"""Counts and reports steps whose loss or gradient is not finite."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spectraformer_jax.train.run import run_folder
from spectraformer_jax.train.run.meters import RUN_AHEAD, Record
from spectraformer_jax.train.step.steps import Sums
from spectraformer_jax.typing import PyTree

# The end of a sentence about a run that has diverged.
ADVICE = "a lower config.optim.lr or another config.optim.clip may help"


class NonFiniteError(ArithmeticError):
  """Too many steps in a row had a loss or gradient that is not finite."""


class SkippedSteps:
  """Counts skipped steps, `RUN_AHEAD` steps late so that no device waits.

  Args:
    record: its `skipped` and `skipped_in_a_row` are updated.
    limit: number of skipped steps in a row that is too many.

  Attributes:
    too_many: the step that reached the limit, and its batch; None before.
  """

  def __init__(self, record: Record, limit: int) -> None:
    self._record = record
    self._limit = limit
    self._pending = collections.deque[tuple[int, Any, Sums]]()
    self.too_many: tuple[int, Mapping[str, np.ndarray]] | None = None

  def add(self, step: int, batch: Mapping[str, np.ndarray], sums: Sums) -> None:
    """Adds a step that was dispatched; counts the one `RUN_AHEAD` before it."""
    self._pending.append((step, batch, sums))
    if len(self._pending) > RUN_AHEAD:
      self._count_oldest()

  def collect(self) -> None:
    """Counts all steps that were added."""
    while self._pending:
      self._count_oldest()

  def _count_oldest(self) -> None:
    step, batch, sums = self._pending.popleft()
    if self.too_many:
      return
    if not float(sums.skipped):
      self._record.skipped_in_a_row = 0
      return
    self._record.skipped += 1
    self._record.skipped_in_a_row += 1
    if self._record.skipped_in_a_row == self._limit:
      self.too_many = step, batch


def write_report(
  folder: Path,
  step: int,
  batch: Mapping[str, np.ndarray],
  record: Record,
  norms: PyTree,
  loss: float,
) -> None:
  """Writes report.md and batch.npz about a skipped step.

  Args:
    folder: made if it does not exist.
    step: the last one skipped.
    batch: of that step.
    record: of the run.
    norms: of parameters and gradients at that step, see `steps.gradient_norms`.
    loss: mean loss of that step.
  """
  folder.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = dict(batch)
  np.savez(folder / "batch.npz", **arrays)
  rows = [
    f"| {jax.tree_util.keystr(path, simple=True, separator='/')} "
    f"| {param:.4g} | {gradient:.4g} | {int(bad)} |"
    for path, (param, gradient, bad) in jax.tree_util.tree_leaves_with_path(
      norms
    )
  ]
  text = f"""\
# No finite loss and gradient at step {step}

{record.skipped_in_a_row} steps in a row were skipped, the last of them step \
{step}; {record.skipped} in the whole run. Loss on that step's batch: \
{loss:.4g}. The batch, or process 0's part of it, is in batch.npz \
(`numpy.load`).

| parameter | its norm | norm of its gradient | not finite |
|---|---|---|---|
"""
  run_folder.write_text(folder / "report.md", text + "\n".join(rows) + "\n")
