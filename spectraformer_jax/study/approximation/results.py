"""Rows of measurements in a CSV file that a killed run can go on with."""

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a row was measured on: rows that agree in all of it are the same.
KEYS = {
  "inputs": str,
  "fingerprint": str,
  "length": int,
  "scale": float,
  "component": str,
  "matrix": str,
  "num_features": int,
  "is_causal": str,
  "target": str,
  "draws": int,
  "seed": int,
  "points": int,
}
FIGURES = (
  *("error", "error_ci", "error_std", "uniform_error"),
  *("output_variance", "output_bias2"),
  *("kernel_bias", "kernel_bias_ci", "kernel_mse", "kernel_mse_ci"),
  *("kernel_mse_median", "kernel_mse_iid", "kernel_mse_iid_median"),
  *("ms", "exact_ms", "temp_mib", "exact_temp_mib", "compile_s"),
)
COLUMNS = (*KEYS, *FIGURES, "device")


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table.

  Attributes:
    key: values of `KEYS`; num_features is None for a map without rows.
    figures: values of `FIGURES`; None where one does not exist.
    device: what it was measured on.
  """

  key: Mapping[str, Any]
  figures: Mapping[str, float | None]
  device: str

  @property
  def pair(self) -> str:
    """Component and matrix, as they are typed."""
    return f"{self.key['component']}-{self.key['matrix']}"

  @property
  def num_features(self) -> int | None:
    """M."""
    return self.key["num_features"]

  def __getitem__(self, figure: str) -> float | None:
    return self.figures[figure]


class Results:
  """The rows of a CSV file; what is added is on disk at once.

  Args:
    path: need not exist. A last line that a kill has cut short is dropped.

  Raises:
    ValueError: the file is something else.
  """

  def __init__(self, path: Path):
    self._path = path
    self._rows: dict[tuple, Row] = {}
    complete = True
    if path.exists():
      with path.open(newline="") as file:
        reader = csv.reader(file)
        header = tuple(next(reader, ()))
        if header and header != COLUMNS:
          raise ValueError(
            f"{str(path)!r} is not a table of this command and version; use "
            "another --out."
          )
        for cells in reader:
          if len(cells) < len(COLUMNS):
            complete = False
            continue
          self._keep(_parse(dict(zip(COLUMNS, cells, strict=True))))
    if not self._rows or not complete:
      self._rewrite()

  def find(self, key: Mapping[str, Any]) -> Row | None:
    """The row measured on this, if there is one."""
    return self._rows.get(_identity(key))

  def add(self, row: Row) -> None:
    """Appends a row."""
    self._keep(row)
    with self._path.open("a", newline="") as file:
      csv.writer(file, lineterminator="\n").writerow(_cells(row))

  def _keep(self, row):
    self._rows[_identity(row.key)] = row

  def _rewrite(self):
    partial = self._path.with_name(f".{self._path.name}.partial")
    with partial.open("w", newline="") as file:
      writer = csv.writer(file, lineterminator="\n")
      writer.writerow(COLUMNS)
      writer.writerows(map(_cells, self._rows.values()))
    partial.replace(self._path)


def _identity(key: Mapping[str, Any]) -> tuple:
  return tuple(key[name] for name in KEYS)


def _cells(row: Row) -> list[Any]:
  # What identifies a row is written in full, figures with six digits.
  values = [row.key[name] for name in KEYS]
  figures = [row.figures[name] for name in FIGURES]
  values += [None if x is None else f"{x:.6g}" for x in figures]
  return ["" if x is None else x for x in values] + [row.device]


def _parse(cells: Mapping[str, str]) -> Row:
  read = lambda kind, text: kind(text) if text else None
  return Row(
    {name: read(kind, cells[name]) for name, kind in KEYS.items()},
    {name: read(float, cells[name]) for name in FIGURES},
    cells["device"],
  )
