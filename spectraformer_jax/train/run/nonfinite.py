"""Steps whose loss or gradient is not finite: counted, then reported."""

import collections
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spectraformer_jax.train.devices import hosts
from spectraformer_jax.train.run import run_folder
from spectraformer_jax.train.run.meters import RUN_AHEAD, Record
from spectraformer_jax.train.step.steps import Sums
from spectraformer_jax.typing import PyTree


class NonFiniteError(ArithmeticError):
  """Too many steps in a row had a loss or gradient that is not finite."""


class SkippedSteps:
  """Counts skipped steps, a few steps late so that no device has to wait.

  Args:
    record: its `skipped` and `skipped_in_a_row` are updated.
    limit: how many in a row are too many.

  Attributes:
    too_many: the step that reached the limit and its batch, None before.
  """

  def __init__(self, record: Record, limit: int):
    self._record = record
    self._limit = limit
    self._pending: collections.deque[tuple[int, Any, Sums]] = (
      collections.deque()
    )
    self.too_many: tuple[int, Mapping[str, np.ndarray]] | None = None

  def add(self, step: int, batch: Mapping[str, np.ndarray], sums: Sums) -> None:
    """Notes a step that is under way; looks at the one `RUN_AHEAD` before."""
    self._pending.append((step, batch, sums))
    if len(self._pending) > RUN_AHEAD:
      self._look()

  def collect(self) -> None:
    """Looks at all steps that were added."""
    while self._pending:
      self._look()

  def _look(self) -> None:
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
  workdir: Path,
  step: int,
  batch: Mapping[str, np.ndarray],
  record: Record,
  gradient_norms: Callable[[Mapping[str, np.ndarray]], tuple[PyTree, Any]],
) -> NonFiniteError:
  """Leaves what explains the skipped steps in the workdir.

  Args:
    workdir: gets a folder nonfinite-step-<step>.
    step: the last one skipped.
    batch: of that step.
    record: of the run.
    gradient_norms: of a batch, at that step; see `steps.gradient_norms`.

  Returns:
    The error to raise.
  """
  norms, loss = jax.device_get(gradient_norms(batch))
  folder = workdir / f"nonfinite-step-{step}"
  error = NonFiniteError(
    f"Loss or gradient were not finite in {record.skipped_in_a_row} steps in "
    f"a row, the last of them step {step}; see {folder}/report.md. A lower "
    "config.optim.lr or another config.optim.clip may help."
  )
  if not hosts.is_main():
    return error
  folder.mkdir(parents=True, exist_ok=True)
  np.savez(folder / "batch.npz", **batch)
  rows = [
    f"| {jax.tree_util.keystr(path, simple=True, separator='/')} "
    f"| {param:.4g} | {gradient:.4g} | {int(bad)} |"
    for path, (param, gradient, bad) in jax.tree_util.tree_leaves_with_path(
      norms
    )
  ]
  text = [
    f"# No finite loss and gradient at step {step}",
    "",
    f"{record.skipped_in_a_row} steps in a row were skipped, the last of them "
    f"step {step}; {record.skipped} in the whole run. Loss on that step's "
    f"batch: {loss:.4g}. The batch, or process 0's part of it, is in batch.npz "
    "(`numpy.load`).",
    "",
    "| parameter | its norm | norm of its gradient | not finite |",
    "|---|---|---|---|",
    *rows,
    "",
  ]
  run_folder.write_text(folder / "report.md", "\n".join(text))
  return error
