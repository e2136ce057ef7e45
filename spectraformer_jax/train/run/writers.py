"""Writes metrics to metrics.jsonl, and shows them in TensorBoard and wandb.

metrics.jsonl is the source of truth; the others are views of it.
"""

import codecs
import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from spectraformer_jax.nn.pretrained import one_line
from spectraformer_jax.train.config import flatten
from spectraformer_jax.train.run import run_folder, strict_json

# The first bytes of a row.
_START = b'{"step": '


def read_rows(workdir: Path | str) -> list[dict[str, Any]]:
  """Reads all valid rows of a workdir's metrics.jsonl, in order.

  Leaves out a last line that is incomplete, after a kill or while it is being
  written. Leaves out other lines that are no rows, with a warning.

  Example:
    >>> read_rows("no/such/folder")
    []
  """
  rows, bad = _scan(Path(workdir) / run_folder.METRICS)
  for number, reason in bad:
    _warn(str(workdir), number, reason)
  return rows


@functools.cache  # warns once for each line
def _warn(workdir: str, number: int, reason: str) -> None:
  logging.warning(
    "line %d of %s is no row of metrics and is left out: %s",
    number,
    Path(workdir) / run_folder.METRICS,
    reason,
  )


def _scan(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
  """Returns the rows, and the number and fault of each line that is no row."""
  rows, bad = [], []
  content = path.read_bytes() if path.exists() else b""
  *lines, rest = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
  for number, line in enumerate(lines, 1):
    try:
      rows.append(_row(line))
    except ValueError as error:
      bad.append((number, one_line(error)))
  try:  # a complete row without its newline
    rows += [_row(rest)] if rest else []
  except ValueError as error:
    if rest[: len(_START)] != _START[: len(rest)]:  # not the start of a row
      bad.append((len(lines) + 1, one_line(error)))
  return rows, bad


def _row(line: bytes) -> dict[str, Any]:
  """Parses one row; a ValueError says why the line is no row."""
  if not line.strip():
    raise ValueError("it is blank")
  row = strict_json.loads(line.decode())
  if not isinstance(row, dict):
    raise ValueError(f"it holds {type(row).__name__} instead of an object")
  step = row.get("step")
  if not isinstance(step, int) or isinstance(step, bool) or step < 0:
    raise ValueError(f"its step must be an integer >= 0, got {step!r}")
  for name, value in row.items():
    if "/" in name and (
      not isinstance(value, int | float) or isinstance(value, bool)
    ):
      raise ValueError(f"its {name!r} must be a number, got {value!r}")
  return row


def finished_result(workdir: Path, num_steps: int) -> dict[str, Any] | None:
  """Returns the result of a run of `num_steps`; None if it has not finished.

  The result of fewer steps does not count: such a run can be continued.
  """
  result = result_row(read_rows(workdir))
  if result is None:
    return None
  planned = result.get("num_steps")
  if planned is None:  # written before runs could be made longer
    stored = run_folder.read_config(workdir, parts=("config",)) or {
      "config": {}
    }
    planned = flatten(stored["config"]).get("train.num_steps", num_steps)
  return result if planned == num_steps else None


def result_row(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
  """Returns the last row of a finished run; None if it has not finished."""
  return rows[-1] if rows and "test/accuracy" in rows[-1] else None


class MetricWriter:
  """Appends rows to metrics.jsonl and to its views; a context manager.

  Args:
    workdir: the run's folder.
    start_step: the step that the run resumes from. Rows of later steps are
      removed, since training writes them again. If a line is no row, the file
      as it was is kept beside the new one.
    tensorboard: whether to write event files too.
    first_row: the step of the first row; if the run resumes from this step or a
      later one and there is no row, a warning is logged.
    wandb: a run of `wandb_run.start` to log to as well.
    enabled: whether to write at all; only process 0 does.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    start_step: int,
    tensorboard: bool,
    first_row: int = 1,
    wandb: Any | None = None,
    enabled: bool = True,
  ) -> None:
    self._file = self._tensorboard = None
    self._wandb = wandb
    if not enabled:
      return
    self._path = workdir / run_folder.METRICS
    self._first_row = first_row
    self._rewrite(workdir, start_step)
    self._file = self._path.open("a")
    if tensorboard:
      from tensorboardX import SummaryWriter

      self._tensorboard = SummaryWriter(
        str(workdir / run_folder.TENSORBOARD), purge_step=start_step + 1
      )

  def _rewrite(self, workdir: Path, start_step: int) -> None:
    """Removes rows after `start_step` and any result; logs their number."""
    rows = read_rows(workdir)  # warns about lines that are no rows
    _, bad = _scan(self._path)
    if bad:
      logging.warning(
        "%s as it was is now %s", self._path, run_folder.set_aside(self._path)
      )
    kept = [
      row
      for row in rows
      if row["step"] <= start_step and "test/accuracy" not in row
    ]
    if not start_step:
      kept = []
    elif not kept and start_step >= self._first_row:
      logging.warning(
        "%s has no rows of the first %d steps: it was deleted or emptied",
        self._path,
        start_step,
      )
    if dropped := len(rows) - len(kept):
      logging.info(
        "%s: %d rows that are not of the first %d steps are dropped; this run "
        "writes them again",
        self._path,
        dropped,
        start_step,
      )
    lines = [strict_json.dumps(row) + "\n" for row in kept]
    run_folder.write_text(self._path, "".join(lines))

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one row; metrics such as "train/loss" go to the views too."""
    if not self._file:
      return
    row = {"step": step, **values, "time": round(time.time(), 3)}
    self._file.write(strict_json.dumps(row) + "\n")
    self._file.flush()
    metrics = {name: value for name, value in values.items() if "/" in name}
    if self._tensorboard:
      for name, value in metrics.items():
        self._tensorboard.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(metrics, step=step)

  def sync(self) -> None:
    """Waits until the rows are on disk; call it before saving a checkpoint."""
    if self._file:
      os.fsync(self._file.fileno())
    if self._tensorboard:
      self._tensorboard.flush()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.sync()
    if self._file:
      self._file.close()
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish(exit_code=int(exc_info[0] is not None))
