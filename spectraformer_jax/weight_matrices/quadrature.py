"""Rows from Gauss-Hermite quadrature: sampled nodes, and sparse grids."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.building_blocks import haar
from spectraformer_jax.weight_matrices.row_laws import open_uniform
from spectraformer_jax.weight_matrices.smolyak import (
  GROWTHS,
  gauss_hermite,
  most_nodes,
  smolyak_grid,
)

_MAX_GRID = 2**16
_MAX_NODES = 64


@WEIGHT_MATRICES.register("gq")
@dataclasses.dataclass(frozen=True)
class GQ(WeightMatrix):
  r"""Subsampled dense Gauss-Hermite grid: independent discrete entries.

  .. math::
    P(W_{mj} = x_l) = p_l, \quad l = 1, \ldots, L

  with the nodes and weights of the L-point Gauss rule of N(0, 1). It samples
  rows of the full grid of L^H nodes by their product weights, so rows count
  equally. Moments agree with the Gaussian's up to degree 2 L - 1 in each
  coordinate; the trigonometric estimate is
  :math:`\prod_j \sum_l p_l \cos(x_l z_j)`, z = x - y: off by 0.2 at most for
  L = 2 (signs) on axis-aligned inputs at :math:`|z|^2 = 2`, by 0.04 for L = 3,
  by less than 1e-3 for L = 8. Variance as that of independent rows: a
  baseline, not an improvement.

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

  info = WeightMatrixInfo(
    name="gq",
    group="quadrature",
    marginals="approximate",
    source="Dao, De Sa and Re 2017, section 3.2",
    summary="independent entries on the nodes of a Gauss-Hermite rule",
    good_for="a baseline for every component",
    cost="M H draws",
    variance="1",
  )

  def __post_init__(self):
    check_positive_int("num_nodes", self.num_nodes)
    if not 2 <= self.num_nodes <= _MAX_NODES:
      raise ValueError(
        f"num_nodes must be from 2 to {_MAX_NODES}, got {self.num_nodes}."
      )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    nodes, weights = gauss_hermite(self.num_nodes)
    borders = np.cumsum(weights)[:-1].astype(np.float32)
    uniforms = open_uniform(rng, (num_rows, head_dim))
    chosen = jnp.searchsorted(borders, uniforms, method="compare_all")
    return {"w": jnp.asarray(nodes, jnp.float32)[chosen]}


@WEIGHT_MATRICES.register("sgq")
@dataclasses.dataclass(frozen=True)
class SGQ(WeightMatrix):
  r"""Sparse-grid quadrature: Smolyak's rule with signed weights.

  .. math::
    \hat K(x, y) = \sum_i a_i f_i(x) f_i(y), \quad
    \{(\omega_i, a_i)\} = A(q, H)

  exact for polynomials of total degree 2 q - 1. Deterministic, so all of its
  error is bias: tiny for small x and y, and useless beyond. Weights are
  negative (at q = 2 the origin has 1 - H/3, and the sizes of all weights add
  up to about 2 H / 3), so that estimates and normalizers of attention can be:
  a diagnostic, not a default. "orf_sqrtd_anti" has the same degree with
  positive weights.

  Args:
    level: q, at least 2.
    growth: nodes of the one-dimensional rules: "odd", 2 i - 1, or "linear", i.
    rotate: turn the grid by a random rotation, the only thing then to redraw.

  Raises:
    ValueError: level below 2 or unknown growth; when built, num_features that
      is not the number of nodes (`num_nodes`; 2 H + 1 at level 2), or more
      than 65536 of them.

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

  def __post_init__(self):
    check_positive_int("level", self.level)
    if self.level < 2:
      raise ValueError(
        f"level must be at least 2, got {self.level}: the rule of level 1 has "
        "one node, the origin."
      )
    if self.growth not in GROWTHS:
      raise ValueError(f"growth must be one of {GROWTHS}, got {self.growth!r}.")

  @property
  def info(self):
    """Facts; it can be redrawn if it rotates."""
    return WeightMatrixInfo(
      name="sgq",
      group="quadrature",
      marginals="approximate",
      source="Dao, De Sa and Re 2017, section 3.1; Smolyak 1963",
      summary="Smolyak grid of Gauss-Hermite rules, signed weights",
      good_for="a diagnostic at small distances",
      constraint="num_features fixed by head_dim and level: 2 H + 1 at level 2",
      cost="a host table once per (H, level)",
      variance="none: trig error 38, pos 0.58 of iid variance at scale 0.2",
      redrawable=self.rotate,
      weighted=True,
      signed=True,
    )

  def num_nodes(self, head_dim: int) -> int:
    """The only num_features that fits.

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

  def check(self, num_rows, head_dim):
    """See `WeightMatrix.check`."""
    needed = self.num_nodes(head_dim)
    if num_rows != needed:
      raise ValueError(
        f"weight matrix 'sgq' with level={self.level} at head_dim={head_dim} "
        f"has exactly {needed} rows, got num_features={num_rows}: use "
        f"num_features={needed}."
      )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del num_rows, law  # fixed by the grid; Gaussian only
    nodes, weights = smolyak_grid(self.level, head_dim, self.growth)
    w = jnp.asarray(nodes, jnp.float32)
    if self.rotate:
      rotation = haar(rng, 1, head_dim)[0]
      w = jnp.matmul(w, rotation, precision="highest")
    # At H = 3 the origin of the grid of level 2 has weight 0.
    sizes = np.maximum(np.abs(weights) * len(weights), 1e-30)
    return {
      "w": w,
      "log_weight": jnp.asarray(np.log(sizes), jnp.float32),
      "sign": jnp.asarray(np.where(weights < 0.0, -1.0, 1.0), jnp.float32),
    }
