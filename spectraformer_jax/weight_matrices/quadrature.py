"""Rows from Gauss-Hermite rules: sampled nodes and sparse grids."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.registry import check_choice, check_int
from spectraformer_jax.typing import Array, Projection
from spectraformer_jax.weight_matrices import base, pieces
from spectraformer_jax.weight_matrices.row_laws import RowLaw, open_uniform

GROWTHS = ("odd", "linear")
# Most nodes of the grid of SGQ, and of the one-dimensional rule of GQ.
_MAX_GRID = 2**16
_MAX_NODES = 64


@functools.lru_cache
def gauss_hermite(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the Gauss rule for N(0, 1), exact to degree ``2 num_nodes - 1``.

  Returns:
    Nodes, ascending, and weights that sum to 1: ``[num_nodes]`` float64,
    read-only.

  Example:
    >>> nodes, weights = gauss_hermite(3)
    >>> (nodes**2).round(3).tolist(), weights.round(3).tolist()
    ([3.0, 0.0, 3.0], [0.167, 0.667, 0.167])
  """
  nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
  # Makes the rule exactly symmetric, so that the middle node of a rule with an
  # odd number of nodes is exactly 0.
  nodes = (nodes - nodes[::-1]) / 2.0
  weights = weights + weights[::-1]
  return pieces.read_only(nodes), pieces.read_only(weights / weights.sum())


@functools.lru_cache(maxsize=16)
def smolyak_grid(
  level: int, dim: int, growth: str
) -> tuple[np.ndarray, np.ndarray]:
  r"""Returns Smolyak's rule for N(0, I_dim), exact to degree 2 level - 1.

  .. math::
    A(q, d) = \sum_{q \le |i|_1 \le q + d - 1} (-1)^{q + d - 1 - |i|_1}
    \binom{d - 1}{q + d - 1 - |i|_1} (U_{i_1} \otimes \cdots \otimes U_{i_d})

  Args:
    level: q, at least 1.
    dim: d.
    growth: how many nodes the Gauss rule U_i has: "odd", 2 i - 1, or "linear",
      i.

  Returns:
    Nodes ``[K, d]``, all different, and weights ``[K]`` that sum to 1; usually
    some weights are negative. Both float64, read-only.

  Example:
    >>> nodes, weights = smolyak_grid(2, 6, "odd")
    >>> nodes.shape, weights[:2].round(3).tolist()
    ((13, 6), [-1.0, 0.167])
  """
  total_weight: dict[tuple[tuple[int, float], ...], float] = {}
  for excess in range(max(0, level - dim), level):
    missing = level - 1 - excess
    coefficient = (-1) ** missing * math.comb(dim - 1, missing)
    # `excess` is the sum of i - 1 over all axes. Axes with i = 1 are left out:
    # the only node of U_1 is 0.
    for excesses in _compositions(excess, dim):
      product = list(_product_rule(excesses, growth))
      for axes in itertools.combinations(range(dim), len(excesses)):
        for values, weight in product:
          pairs = zip(axes, values, strict=True)
          node = tuple((axis, value) for axis, value in pairs if value)
          old = total_weight.get(node, 0.0)
          total_weight[node] = old + coefficient * weight
  nodes = np.zeros((len(total_weight), dim))
  for row, node in enumerate(total_weight):
    for axis, value in node:
      nodes[row, axis] = value
  weights = np.array(list(total_weight.values()))
  return pieces.read_only(nodes), pieces.read_only(weights)


def most_nodes(level: int, dim: int) -> int:
  """Returns an upper bound on the number of nodes of `smolyak_grid`."""
  return sum(
    math.comb(dim, len(excesses)) * math.prod(2 * k for k in excesses)
    for excess in range(level)
    for excesses in _compositions(excess, dim)
  )


def _product_rule(
  excesses: tuple[int, ...], growth: str
) -> Iterator[tuple[tuple[float, ...], float]]:
  """Yields nodes and weights of the product of the rules U_(excess + 1)."""
  rules = [
    gauss_hermite(2 * excess + 1 if growth == "odd" else excess + 1)
    for excess in excesses
  ]
  for choice in itertools.product(*(range(len(nodes)) for nodes, _ in rules)):
    pairs = list(zip(rules, choice, strict=True))
    values = tuple(float(nodes[i]) for (nodes, _), i in pairs)
    yield values, math.prod(float(weights[i]) for (_, weights), i in pairs)


def _compositions(total: int, most_parts: int) -> Iterator[tuple[int, ...]]:
  """Yields all tuples of at most `most_parts` positive integers of one sum."""
  if total == 0:
    yield ()
  elif most_parts > 0:
    for first in range(1, total + 1):
      for rest in _compositions(total - first, most_parts - 1):
        yield (first, *rest)


@base.WEIGHT_MATRICES.register("gq")
@dataclasses.dataclass(frozen=True)
class GQ(base.GaussianRows):
  r"""Subsampled dense Gauss-Hermite grid: independent discrete entries.

  .. math::
    P(W_{mj} = x_l) = p_l, \quad l = 1, \ldots, L

  with the nodes :math:`x_l` and weights :math:`p_l` of the L-point Gauss rule
  for N(0, 1). A row is a node of the full grid of L^H nodes, drawn with its
  weight in the grid as probability; so all rows have equal weight. Moments
  agree with those of the Gaussian up to degree 2 L - 1 in each coordinate.
  Trigonometric estimates have the mean
  :math:`\prod_j \sum_l p_l \cos(x_l z_j)`, z = x - y. For axis-aligned inputs
  at :math:`|z|^2 = 2` the error of this mean is up to 0.2 for L = 2 (random
  signs), 0.04 for L = 3, less than 1e-3 for L = 8. The variance is that of
  independent rows: a baseline, not an improvement.

  Args:
    num_nodes: L, from 2 to 64.

  Raises:
    ValueError: `num_nodes` outside that range.

  References:
    Dao, De Sa and Re, Gaussian Quadrature for Kernel Features, 2017,
    section 3.2 (1709.02605).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map(
    ...   "trigrf", "gq", num_features=8, weight_matrix_kwargs={"num_nodes": 2}
    ... )
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"]
    >>> bool(jnp.allclose(jnp.abs(w), 1.0))
    True
  """

  num_nodes: int = 8

  info = base.WeightMatrixInfo(
    name="gq",
    group="quadrature",
    marginals="approximate",
    source="Dao, De Sa and Re 2017, section 3.2",
    summary="independent entries on the nodes of a Gauss-Hermite rule",
    good_for="a baseline for every component",
    cost="M H draws",
    variance="1",
  )

  def __post_init__(self) -> None:
    check_int("num_nodes", self.num_nodes, 2, _MAX_NODES)

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    nodes, weights = gauss_hermite(self.num_nodes)
    borders = np.cumsum(weights)[:-1].astype(np.float32)
    uniforms = open_uniform(rng, (num_rows, head_dim))
    chosen = jnp.searchsorted(borders, uniforms, method="compare_all")
    return jnp.asarray(nodes, jnp.float32)[chosen]


@base.WEIGHT_MATRICES.register("sgq")
@dataclasses.dataclass(frozen=True)
class SGQ(base.WeightMatrix):
  r"""Sparse-grid quadrature: Smolyak's rule with signed weights.

  .. math::
    \hat K(x, y) = \sum_i a_i f_i(x) f_i(y), \quad
    \{(\omega_i, a_i)\} = A(q, H)

  with Smolyak's rule A(q, H), exact for polynomials of degree up to 2 q - 1.
  The rule is deterministic, so its whole error is bias: tiny for small x and y,
  too large to be of use elsewhere. Some weights are negative (at q = 2 that of
  the origin is 1 - H/3, and the absolute weights add up to about 2 H / 3), so
  kernel estimates and normalizers of attention can be negative: for diagnosis,
  not for models. "orf_sqrtd_anti" has the same degree with positive weights.

  Args:
    level: q, at least 2. (The rule of level 1 has one node, the origin.)
    growth: how many nodes the one-dimensional rule i has: "odd", 2 i - 1, or
      "linear", i.
    rotate: rotate the grid randomly. Only a rotated grid can be redrawn.

  Raises:
    ValueError: `level` below 2 or unknown `growth`. When built: num_features is
      not the number of nodes (`num_nodes`; 2 H + 1 at level 2), or the grid has
      more than 65536 nodes.

  References:
    Dao, De Sa and Re, Gaussian Quadrature for Kernel Features, 2017,
    section 3.1 (1709.02605); Smolyak 1963.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "sgq", num_features=9)
    >>> rows = fm.init(jax.random.key(0), head_dim=4).projection["rows"]
    >>> [float(s) for s in rows["sign"][0, :3]]
    [-1.0, 1.0, 1.0]
  """

  level: int = 2
  growth: str = "odd"
  rotate: bool = False

  facts = base.WeightMatrixInfo(
    name="sgq",
    group="quadrature",
    marginals="approximate",
    source="Dao, De Sa and Re 2017, section 3.1; Smolyak 1963",
    summary="Smolyak grid of Gauss-Hermite rules, signed weights",
    good_for="a diagnostic at small distances",
    constraint="num_features fixed by head_dim and level: 2 H + 1 at level 2",
    cost="a host table once per (H, level)",
    variance="trig 38, pos 0.58 at scale 0.2, all of it bias",
    redrawable=False,
    weighted=True,
    signed=True,
  )

  def __post_init__(self) -> None:
    check_int("level", self.level, 2)
    check_choice("growth", self.growth, GROWTHS)

  def _info(self) -> base.WeightMatrixInfo:
    return dataclasses.replace(self.facts, redrawable=self.rotate)

  info = base.info_from_options(_info)

  def num_nodes(self, head_dim: int) -> int:
    """Returns the only num_features that this grid accepts.

    Args:
      head_dim: H.

    Raises:
      ValueError: the grid would have more than 65536 nodes.

    Example:
      >>> SGQ().num_nodes(32), SGQ(level=3).num_nodes(32)
      (65, 2177)
    """
    if most_nodes(self.level, head_dim) > _MAX_GRID:
      raise ValueError(
        f"weight matrix 'sgq' with level={self.level} at head_dim={head_dim} "
        f"would have more than {_MAX_GRID} rows: use a lower level."
      )
    return len(smolyak_grid(self.level, head_dim, self.growth)[1])

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    needed = self.num_nodes(head_dim)
    if num_rows != needed:
      raise ValueError(
        f"weight matrix 'sgq' with level={self.level} at head_dim={head_dim} "
        f"has exactly {needed} rows, got num_features={num_rows}: use "
        f"num_features={needed}."
      )

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    nodes, weights = smolyak_grid(self.level, head_dim, self.growth)
    w = jnp.asarray(nodes, jnp.float32)
    if self.rotate:
      rotation = pieces.haar(rng, 1, head_dim)[0]
      w = jnp.matmul(w, rotation, precision="highest")
    # A weight can be 0 (the origin at level 2, H = 3), and its log infinite.
    sizes = np.maximum(np.abs(weights) * len(weights), 1e-30)
    return {
      "w": w,
      "log_weight": jnp.asarray(np.log(sizes), jnp.float32),
      "sign": jnp.asarray(np.where(weights < 0.0, -1.0, 1.0), jnp.float32),
    }
