"""Metrics: JSON lines are the source of truth, TensorBoard a view of them."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectraformer_jax.train import workdir as files


def read_rows(workdir: Path | str) -> list[dict[str, Any]]:
  """All complete rows of a workdir's metrics.jsonl, in order.

  A last line that a kill has cut short is left out.

  Example:
    >>> read_rows("no/such/folder")
    []
  """
  path = Path(workdir) / files.METRICS
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def result_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
  """The last row of a finished run, None if it has not finished."""
  return rows[-1] if rows and "test/accuracy" in rows[-1] else None


class MetricWriter:
  """Appends rows to metrics.jsonl, and to what else shows them.

  A context manager.

  Args:
    workdir: the run's folder.
    start_step: rows of later steps, left by a run that was stopped after its
      last checkpoint, are removed first: training will write them again.
    tensorboard: write event files too.
    wandb: of `wandb_run.start`, to log to as well.
    enabled: False makes one that writes nothing, for all processes but one.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    start_step: int,
    tensorboard: bool,
    wandb: Any | None = None,
    enabled: bool = True,
  ):
    self._file = self._tensorboard = None
    self._wandb = wandb
    if not enabled:
      return
    self._path = workdir / files.METRICS
    kept = [
      row
      for row in read_rows(workdir)
      if row["step"] <= start_step and "test/accuracy" not in row
    ]
    lines = [json.dumps(row) + "\n" for row in kept if start_step]
    files.write_text(self._path, "".join(lines))
    self._file = self._path.open("a")
    if tensorboard:
      from tensorboardX import SummaryWriter

      self._tensorboard = SummaryWriter(
        str(workdir / files.TENSORBOARD),
        purge_step=start_step + 1,
      )

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """One row; metrics ("train/loss") go to the other views as well."""
    if not self._file:
      return
    row = {"step": step, **values, "time": round(time.time(), 3)}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    metrics = {name: value for name, value in values.items() if "/" in name}
    if self._tensorboard:
      for name, value in metrics.items():
        self._tensorboard.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(metrics, step=step)

  def sync(self) -> None:
    """Waits until the rows are on disk; call it before a checkpoint."""
    if self._file:
      os.fsync(self._file.fileno())
    if self._tensorboard:
      self._tensorboard.flush()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc_info: Any) -> None:
    self.sync()
    if self._file:
      self._file.close()
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish(exit_code=int(exc_info[0] is not None))
