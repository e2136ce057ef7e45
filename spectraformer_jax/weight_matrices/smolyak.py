"""Gauss-Hermite rules, and Smolyak's sparse combination of them."""

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

GROWTHS = ("odd", "linear")


@functools.lru_cache
def gauss_hermite(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
  """Gauss rule for N(0, 1): exact up to degree ``2 num_nodes - 1``.

  Returns:
    Nodes, ascending, and weights that sum to 1: ``[L]`` float64, read-only.

  Example:
    >>> nodes, weights = gauss_hermite(3)
    >>> (nodes**2).round(3).tolist(), weights.round(3).tolist()
    ([3.0, 0.0, 3.0], [0.167, 0.667, 0.167])
  """
  nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
  # Exactly symmetric, so that equal nodes of different rules are equal.
  nodes = (nodes - nodes[::-1]) / 2.0
  weights = weights + weights[::-1]
  return _frozen(nodes), _frozen(weights / weights.sum())


@functools.lru_cache(maxsize=16)
def smolyak_grid(
  level: int, dim: int, growth: str
) -> tuple[np.ndarray, np.ndarray]:
  r"""Smolyak's rule for N(0, I_dim), exact to total degree 2 level - 1.

  .. math::
    A(q, d) = \sum_{q \le |i|_1 \le q + d - 1} (-1)^{q + d - 1 - |i|_1}
    \binom{d - 1}{q + d - 1 - |i|_1} (U_{i_1} \otimes \cdots \otimes U_{i_d})

  Args:
    level: q, at least 1.
    dim: d.
    growth: nodes of the Gauss rule U_i: "odd", 2 i - 1, or "linear", i.

  Returns:
    Nodes ``[K, d]``, all different, and their weights ``[K]``, float64,
    read-only: they sum to 1, and most often some are negative.

  Example:
    >>> nodes, weights = smolyak_grid(2, 6, "odd")
    >>> nodes.shape, weights[:2].round(3).tolist()
    ((13, 6), [-1.0, 0.167])
  """
  total_weight: dict[tuple[tuple[int, float], ...], float] = {}
  for excess in range(max(0, level - dim), level):
    missing = level - 1 - excess
    coefficient = (-1) ** missing * math.comb(dim - 1, missing)
    # The rule of excess 0 has one node, 0: only other axes take part.
    for excesses in _compositions(excess, dim):
      product = list(_product_rule(excesses, growth))
      for axes in itertools.combinations(range(dim), len(excesses)):
        for values, weight in product:
          node = tuple(
            (axis, value)
            for axis, value in zip(axes, values, strict=True)
            if value
          )
          total_weight[node] = (
            total_weight.get(node, 0.0) + coefficient * weight
          )
  nodes = np.zeros((len(total_weight), dim))
  for row, node in enumerate(total_weight):
    for axis, value in node:
      nodes[row, axis] = value
  return _frozen(nodes), _frozen(np.array(list(total_weight.values())))


def most_nodes(level: int, dim: int) -> int:
  """An upper bound on the nodes of `smolyak_grid`, without building it."""
  return sum(
    math.comb(dim, len(excesses)) * math.prod(2 * k for k in excesses)
    for excess in range(level)
    for excesses in _compositions(excess, dim)
  )


def _product_rule(
  excesses: tuple[int, ...], growth: str
) -> Iterator[tuple[tuple[float, ...], float]]:
  """Nodes and weights of the tensor product of the rules i = excess + 1."""
  rules = [
    gauss_hermite(2 * excess + 1 if growth == "odd" else excess + 1)
    for excess in excesses
  ]
  for choice in itertools.product(*(range(len(nodes)) for nodes, _ in rules)):
    pairs = list(zip(rules, choice, strict=True))
    values = tuple(float(nodes[i]) for (nodes, _), i in pairs)
    yield values, math.prod(float(weights[i]) for (_, weights), i in pairs)


def _compositions(total: int, most_parts: int) -> Iterator[tuple[int, ...]]:
  """Ways to write `total` as an ordered sum of at most that many positives."""
  if total == 0:
    yield ()
  elif most_parts > 0:
    for first in range(1, total + 1):
      for rest in _compositions(total - first, most_parts - 1):
        yield (first, *rest)


def _frozen(table: np.ndarray) -> np.ndarray:
  """Read-only: it is shared by all who ask for it."""
  table.setflags(write=False)
  return table
