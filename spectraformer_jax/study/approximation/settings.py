"""Rows grouped by what was asked of the pairs, ranked and compared."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats as distributions

from spectraformer_jax.study.approximation.results import Row

SIGNIFICANCE = 0.05


class Slope(NamedTuple):
  """Of log error against log M: -1/2 for a mean over independent rows.

  Attributes:
    slope: by least squares.
    standard_error: of the fit; None for two points.
    intercept: log error at M = 1.
  """

  slope: float
  standard_error: float | None
  intercept: float


class Setting(NamedTuple):
  """One set of scaled inputs and all that was measured on it.

  Attributes:
    inputs: name of the inputs, such as a layer's.
    length: number of keys.
    scale: of queries and keys.
    rows: of all pairs and sizes.
  """

  inputs: str
  length: int
  scale: float
  rows: list[Row]

  @property
  def title(self) -> str:
    """For headings."""
    return f"{self.inputs}, length {self.length}, scale {self.scale:g}"

  @property
  def uniform_error(self) -> float:
    """Error of uniform attention."""
    return self.rows[0]["uniform_error"]

  @property
  def sizes(self) -> list[int]:
    """All M, in order."""
    return sorted({row.num_features for row in self.rows} - {None})

  @property
  def pairs(self) -> list[str]:
    """Names, in the order of the rows."""
    return list(dict.fromkeys(row.pair for row in self.rows))

  def of_pair(self, pair: str) -> list[Row]:
    """The rows of a pair, few features first."""
    rows = [row for row in self.rows if row.pair == pair]
    return sorted(rows, key=lambda row: row.num_features or 0)

  def largest(self, pair: str) -> Row:
    """The row of a pair with most features."""
    return self.of_pair(pair)[-1]

  def ranking(self) -> list[Row]:
    """One row of each pair, that with most features, least error first."""
    return sorted(map(self.largest, self.pairs), key=_error)

  def best(self) -> Row:
    """The row with the least error of all."""
    return min(self.rows, key=_error)

  def slope(self, pair: str) -> Slope | None:
    """How the error of a pair falls with M; None for fewer than two sizes."""
    points = [
      (row.num_features, row["error"])
      for row in self.of_pair(pair)
      if row.num_features and math.isfinite(row["error"]) and row["error"] > 0
    ]
    if len(points) < 2:
      return None
    fit = distributions.linregress(*np.log(points).T)
    error = float(fit.stderr) if len(points) > 2 else None
    return Slope(float(fit.slope), error, float(fit.intercept))


def settings_of(rows: Sequence[Row]) -> list[Setting]:
  """Rows grouped by their inputs, length and scale, in order."""
  groups: dict[tuple, list[Row]] = {}
  for row in rows:
    names = ("inputs", "length", "scale", "fingerprint")
    groups.setdefault(tuple(row.key[name] for name in names), []).append(row)
  return [Setting(*key[:3], group) for key, group in groups.items()]


def told_apart(one: Row, other: Row) -> bool:
  """Whether the mean errors of two rows differ (Welch's t-test, 5 %)."""
  samples = []
  for row in (one, other):
    if row["error_std"] is None:
      return False  # a single draw says nothing
    samples += [row["error"], row["error_std"], row.key["draws"]]
  if not samples[1] and not samples[4]:
    return samples[0] != samples[3]  # neither depends on the draw
  test = distributions.ttest_ind_from_stats(*samples, equal_var=False)
  return bool(test.pvalue < SIGNIFICANCE)


def beats_uniform(row: Row) -> bool:
  """Whether the error is below that of uniform attention, interval included."""
  return row["error"] + (row["error_ci"] or 0.0) < row["uniform_error"]


def over_uniform(row: Row) -> float:
  """The error over that of uniform attention; NaN if that is exact."""
  return row["error"] / (row["uniform_error"] or math.nan)


def _error(row: Row) -> float:
  """For sorting: what is not a number comes last."""
  return row["error"] if math.isfinite(row["error"]) else math.inf
