"""Measurements in a CSV file, from which a killed run continues."""

import csv
import io
import math
from pathlib import Path
from typing import Any, NamedTuple

from spectraformer_jax.commands import parse_literal
from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.train.run.run_folder import write_text


class Key(NamedTuple):
  """What was measured, on which inputs; equal keys are the same measurement.

  Attributes:
    inputs, fingerprint, length: of the inputs; see `inputs.Inputs`.
    scale: of queries and keys.
    component, matrix: of the pair, as they are typed.
    num_features: M; None for a map without rows.
    is_causal, target, draws, seed, points: see `measure.Options`.
    window, num_sinks, num_heavy: see `ExactKeys`.
  """

  inputs: str
  fingerprint: str
  length: int
  scale: float
  component: str
  matrix: str
  num_features: int | None
  is_causal: bool
  target: str
  draws: int
  seed: int
  points: int
  window: tuple[int, int] | None = None
  num_sinks: int = 0
  num_heavy: int = 0

  @property
  def exact(self) -> ExactKeys:
    """The keys that attention saw exactly."""
    return ExactKeys(self.window, self.num_sinks, self.num_heavy)


class Figures(NamedTuple):
  """The figures of a measurement; docs/study.md says what they mean.

  A figure that does not exist is None: interval and variance of a single draw,
  and kernel figures of a map without a fixed kernel.
  """

  error: float
  error_ci: float | None
  error_std: float | None
  uniform_error: float
  output_variance: float | None
  output_bias2: float | None
  kernel_bias: float | None = None
  kernel_bias_ci: float | None = None
  kernel_mse: float | None = None
  kernel_mse_ci: float | None = None
  kernel_mse_median: float | None = None
  kernel_mse_iid: float | None = None
  kernel_mse_iid_median: float | None = None
  ms: float = math.nan
  exact_ms: float = math.nan
  temp_mib: float = math.nan
  exact_temp_mib: float = math.nan
  compile_s: float = math.nan


class Measurement(NamedTuple):
  """A line of the CSV file.

  Attributes:
    key: what was measured.
    figures: what came out.
    device: kind of the device that ran it.
  """

  key: Key
  figures: Figures
  device: str

  @property
  def pair(self) -> str:
    """Component and matrix, as they are typed."""
    return f"{self.key.component}-{self.key.matrix}"


COLUMNS = (*Key._fields, *Figures._fields, "device")
# They read the cells of a key, in the order of its fields.
_READ_KEY = (str, str, int, float, str, str, int, "True".__eq__)
_READ_KEY += (str, int, int, int, parse_literal, int, int)
# Columns of files that earlier versions wrote: without exact keys.
_EARLIER = tuple(name for name in COLUMNS if name not in ExactKeys._fields)


class Results:
  """The measurements of a CSV file; writes an added one at once.

  Args:
    path: of the file; it is created if missing. A last line that a killed run
      has not written to its end is dropped. A file without columns of exact
      keys gets them.

  Attributes:
    rows: the measurements by their keys, in the order of the file.

  Raises:
    ValueError: the file has other columns.
  """

  def __init__(self, path: Path) -> None:
    self._path = path
    self.rows: dict[Key, Measurement] = {}
    text = path.read_text() if path.exists() else ""
    text = text[: text.rfind("\n") + 1] or ",".join(COLUMNS) + "\n"
    header, *lines = csv.reader(text.splitlines())
    if tuple(header) == _EARLIER:
      place = COLUMNS.index(ExactKeys._fields[0])
      lines = [[*row[:place], "", "0", "0", *row[place:]] for row in lines]
    elif tuple(header) != COLUMNS:
      raise ValueError(
        f"{str(path)!r} is not a table of this command and version; use "
        "another --out."
      )
    for line in lines:
      measurement = _parse(line)
      self.rows[measurement.key] = measurement
    whole = io.StringIO()
    csv.writer(whole, lineterminator="\n").writerows([COLUMNS, *lines])
    write_text(path, whole.getvalue())

  def add(self, measurement: Measurement) -> None:
    """Appends a measurement to the file."""
    self.rows[measurement.key] = measurement
    key, figures, device = measurement
    # Writes keys in full, since they identify the line; figures in six digits.
    shown = [None if x is None else f"{x:.6g}" for x in figures]
    with self._path.open("a", newline="") as file:
      csv.writer(file, lineterminator="\n").writerow([*key, *shown, device])


def _parse(line: list[str]) -> Measurement:
  """Reads a line of the file."""
  *cells, device = line
  count = len(Key._fields)
  key: list[Any] = [
    read(cell) if cell else None
    for read, cell in zip(_READ_KEY, cells[:count], strict=True)
  ]
  figures = [float(cell) if cell else None for cell in cells[count:]]
  return Measurement(Key._make(key), Figures._make(figures), device)
