"""Groups measurements by their inputs, ranks and compares them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as distributions

from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.study import SIGNIFICANCE
from spectraformer_jax.study.approximation.results import Measurement


class Slope(NamedTuple):
  """A line fitted to log error against log M.

  Attributes:
    slope: by least squares; -1/2 is expected of a mean over independent rows.
    standard_error: of the slope; None for two points.
    intercept: log error at M = 1.
  """

  slope: float
  standard_error: float | None
  intercept: float


class Setting(NamedTuple):
  """One set of scaled inputs and all measurements on it.

  Attributes:
    inputs: name of the inputs, such as a layer's.
    length: number of keys.
    scale: of queries and keys.
    exact: keys that attention saw exactly.
    rows: measurements of all pairs and sizes.
  """

  inputs: str
  length: int
  scale: float
  exact: ExactKeys
  rows: list[Measurement]

  @property
  def title(self) -> str:
    """Inputs, length, scale and exact keys, for headings."""
    title = f"{self.inputs}, length {self.length}, scale {self.scale:g}"
    for name, value in self.exact._asdict().items():
      if value != ExactKeys._field_defaults[name]:
        title += f", {name} {value}"
    return title

  @property
  def uniform_error(self) -> float:
    """Error of uniform attention."""
    return self.rows[0].figures.uniform_error

  @property
  def sizes(self) -> list[int]:
    """All numbers of features M, in ascending order."""
    sizes = {row.key.num_features for row in self.rows}
    return sorted(size for size in sizes if size is not None)

  @property
  def pairs(self) -> list[str]:
    """Names of the pairs, in the order of the measurements."""
    return list(dict.fromkeys(row.pair for row in self.rows))

  def of_pair(self, pair: str) -> list[Measurement]:
    """The measurements of a pair, by ascending number of features."""
    rows = [row for row in self.rows if row.pair == pair]
    return sorted(rows, key=lambda row: row.key.num_features or 0)

  def largest(self, pair: str) -> Measurement:
    """The measurement of this pair that has the most features."""
    return self.of_pair(pair)[-1]

  def ranking(self) -> list[Measurement]:
    """The measurement of each pair with the most features, best first."""
    return sorted(map(self.largest, self.pairs), key=_error)

  def best(self) -> Measurement:
    """The measurement with the least error of all."""
    return min(self.rows, key=_error)

  def slope(self, pair: str) -> Slope | None:
    """How the error of a pair falls with M; None for fewer than two sizes.

    Leaves out errors that are zero or not finite.
    """
    points = [
      (row.key.num_features, row.figures.error)
      for row in self.of_pair(pair)
      if row.key.num_features and 0 < row.figures.error < math.inf
    ]
    if len(points) < 2:
      return None
    x, y = np.log(np.asarray(points)).T
    fit: Any = distributions.linregress(x, y)  # scipy has no types
    error = float(fit.stderr) if len(points) > 2 else None
    return Slope(float(fit.slope), error, float(fit.intercept))


def settings_of(rows: Sequence[Measurement]) -> list[Setting]:
  """Groups measurements by inputs, length, scale and exact keys, in order."""
  groups: dict[tuple[str, int, float, ExactKeys, str], list[Measurement]] = {}
  for row in rows:
    key = row.key
    group = (key.inputs, key.length, key.scale, key.exact, key.fingerprint)
    groups.setdefault(group, []).append(row)
  return [
    Setting(inputs, length, scale, exact, group)
    for (inputs, length, scale, exact, _), group in groups.items()
  ]


def differ_significantly(one: Measurement, other: Measurement) -> bool:
  """Whether the mean errors differ significantly (Welch's t-test, 5 %)."""
  first, second = one.figures, other.figures
  if first.error_std is None or second.error_std is None:
    return False  # a single draw has no spread
  if not first.error_std and not second.error_std:
    return first.error != second.error  # neither depends on the draw
  test = distributions.ttest_ind_from_stats(
    first.error,
    first.error_std,
    one.key.draws,
    second.error,
    second.error_std,
    other.key.draws,
    equal_var=False,
  )
  return bool(test.pvalue < SIGNIFICANCE)


def beats_uniform(row: Measurement) -> bool:
  """Whether the error's interval lies below the error of uniform attention."""
  figures = row.figures
  return figures.error + (figures.error_ci or 0.0) < figures.uniform_error


def over_uniform(row: Measurement) -> float:
  """The error over that of uniform attention; NaN if the latter is zero."""
  return row.figures.error / (row.figures.uniform_error or math.nan)


def _error(row: Measurement) -> float:
  """The error, with NaN replaced by infinity, for sorting."""
  return row.figures.error if math.isfinite(row.figures.error) else math.inf
