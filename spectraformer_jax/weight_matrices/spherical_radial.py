"""Stochastic spherical-radial rules: weighted rows on random spheres."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.registry import check_int
from spectraformer_jax.typing import Array, Projection
from spectraformer_jax.weight_matrices import base, pieces
from spectraformer_jax.weight_matrices.geometric import orthogonal_directions
from spectraformer_jax.weight_matrices.row_laws import RowLaw

# Most radii of SROMC.
_MAX_RADII = 16


@base.WEIGHT_MATRICES.register("ssr")
@dataclasses.dataclass(frozen=True)
class SSR(base.WeightMatrix):
  r"""Spherical-radial quadrature of degree (3, 3): signed weights, unbiased.

  .. math::
    \omega_i = \rho_b Q_b v_i, \quad Q_b \sim \mathrm{Haar}(H), \quad
    \rho_b \sim \chi_{H+2}, \quad a_i = \frac{H}{(M - 1) \rho_i^2}, \quad
    a_0 = 1 - \sum_i a_i

  with the H + 1 corners :math:`v_i` of a regular simplex in each block b. One
  row is the origin, :math:`\omega_0 = 0`; the other M - 1 rows come from as
  many blocks as needed. The row weights :math:`a` make every component
  unbiased. :math:`a_0` is negative in about half of the draws, so estimates can
  be negative. The noise of :math:`a_0` does not decrease with the distance, so
  the variance is lower at small :math:`|x - y|` only (for trigonometric maps it
  is 5 times that of independent rows at scale 0.5).

  Args:
    symmetric: use corners and their negatives, next to each other. Complete
      blocks are then exact for polynomials of degree 3 instead of 2. This
      option is for positive maps; trigonometric features of a row and its
      negative are equal.

  Raises:
    ValueError: when built: fewer than 2 rows.

  References:
    Munkhoeva, Kapushev, Burnaev and Oseledets, Quadrature-Based Features for
    Kernel Approximation, 2018, equation 9 (1802.03832).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "ssr", num_features=11)
    >>> rows = fm.init(jax.random.key(0), head_dim=4).projection["rows"]
    >>> total = (rows["sign"] * jax.numpy.exp(rows["log_weight"])).sum() / 11
    >>> bool(abs(total - 1.0) < 1e-5)
    True
  """

  symmetric: bool = False

  info = base.WeightMatrixInfo(
    name="ssr",
    group="quadrature",
    marginals="weighted",
    source="Munkhoeva et al. 2018, equation 9",
    summary="rotated simplices on random spheres, and the origin",
    good_for="kernel estimates at small distances",
    constraint="num_features >= 2, any head_dim",
    cost="ceil(M/(H+1)) QR factorisations of H x H",
    variance="trig 0.96, pos 0.54 at scale 0.2, H=32, M=128",
    weighted=True,
    signed=True,
  )

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    if num_rows < 2:
      raise ValueError(
        "weight matrix 'ssr' needs num_features >= 2 (one row is the origin), "
        f"got {num_rows}."
      )

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    nodes = _sphere_nodes(rng, num_rows - 1, head_dim, self.symmetric)
    squares = jnp.sum(jnp.square(nodes), axis=-1)
    weights = head_dim / ((num_rows - 1) * squares)
    origin = 1.0 - jnp.sum(weights, keepdims=True)
    weights = jnp.concatenate([origin, weights])
    sizes = jnp.maximum(jnp.abs(weights), 1e-30)
    return {
      "w": jnp.concatenate([jnp.zeros((1, head_dim), nodes.dtype), nodes]),
      "log_weight": jnp.log(sizes) + math.log(num_rows),
      "sign": jnp.where(weights < 0.0, -1.0, 1.0).astype(jnp.float32),
    }


@base.WEIGHT_MATRICES.register("ssr_pos")
@dataclasses.dataclass(frozen=True)
class SSRPos(base.WeightMatrix):
  r"""`SSR` without the origin: positive weights and a small bias.

  .. math::
    a_i = \rho_i^{-2} / \textstyle\sum_k \rho_k^{-2}

  Estimates of positive maps stay positive. The bias comes from normalising the
  weights over n = M / (H + 1) blocks. For trigonometric estimates it is, to
  first order in 1/n, :math:`-\tfrac{H}{(H - 2) n} [{}_1F_1(\tfrac H2 - 1;
  \tfrac H2; -\tfrac s2) - e^{-s/2}]`, :math:`s = |x - y|^2` (0.006 at s = 2,
  H = 32, M = 128); for positive estimates replace :math:`-s` by
  :math:`+|x + y|^2`. A single block has equal weights and the bias
  :math:`-\tfrac sH e^{-s/2}`; for two blocks the first order is a rough guide.

  Args:
    symmetric: as for `SSR`.

  References:
    Munkhoeva et al. 2018, equation 9 (1802.03832), self-normalised.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "ssr_pos", num_features=10)
    >>> rows = fm.init(jax.random.key(0), head_dim=4).projection["rows"]
    >>> bool(abs(jax.numpy.exp(rows["log_weight"]).mean() - 1.0) < 1e-5)
    True
  """

  symmetric: bool = False

  info = base.WeightMatrixInfo(
    name="ssr_pos",
    group="quadrature",
    marginals="approximate",
    source="Munkhoeva et al. 2018, equation 9, self-normalised",
    summary="rotated simplices on random spheres, positive weights",
    good_for="positive maps at small distances",
    cost="ceil(M/(H+1)) QR factorisations of H x H",
    variance="trig 1.10, pos 0.70 at scale 0.2, H=32, M=128",
    weighted=True,
  )

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    nodes = _sphere_nodes(rng, num_rows, head_dim, self.symmetric)
    log_sizes = -jnp.log(jnp.sum(jnp.square(nodes), axis=-1))
    log_mean = jax.nn.logsumexp(log_sizes) - math.log(num_rows)
    return {"w": nodes, "log_weight": log_sizes - log_mean}


@base.WEIGHT_MATRICES.register("sr_omc")
@dataclasses.dataclass(frozen=True)
class SROMC(base.WeightMatrix):
  r"""Gauss-Laguerre radii on orthogonal directions: positive weights.

  .. math::
    \omega_{il} = \sqrt{2 T_l}\, u_i, \quad a_{il} = \lambda_l L / M

  with the nodes :math:`T_l` and normalised weights :math:`\lambda_l` of the
  L-point Gauss-Laguerre rule of order H/2 - 1 (for the law of
  :math:`|w|^2 / 2`), and M / L directions :math:`u_i`, orthogonal in blocks of
  H. With :math:`s = |x - y|^2` the mean of trigonometric estimates is
  :math:`\sum_l \lambda_l\, {}_0F_1(; H/2; -T_l s / 2)`: a bias of about 1e-3 at
  L = 2. Since each direction is used L times, these rows suit small distances
  only.

  Args:
    num_radii: L, from 1 to 16.

  Raises:
    ValueError: `num_radii` outside that range. When built: num_features is not
      a multiple of `num_radii`.

  References:
    Belhadji et al., On the design of scalable, high-precision spherical-radial
    Fourier features, 2024 (2408.13231).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "sr_omc", num_features=8)
    >>> fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"].shape
    (1, 8, 4)
  """

  num_radii: int = 2

  info = base.WeightMatrixInfo(
    name="sr_omc",
    group="quadrature",
    marginals="approximate",
    source="2408.13231",
    summary="Gauss-Laguerre radii on orthogonal directions",
    good_for="trigonometric maps at small distances",
    constraint="num_features a multiple of num_radii (2 unless set)",
    cost="ceil(M/(L H)) QR factorisations of H x H",
    variance="trig 0.66, pos 0.93 at scale 0.2, H=32, M=128",
    weighted=True,
  )

  def __post_init__(self) -> None:
    check_int("num_radii", self.num_radii, 1, _MAX_RADII)

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    if num_rows % self.num_radii:
      more = num_rows + -num_rows % self.num_radii
      raise ValueError(
        f"weight matrix 'sr_omc' with num_radii={self.num_radii} needs a "
        f"multiple of it, got num_features={num_rows}: use num_features={more}."
      )

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    halves, weights = gauss_laguerre(self.num_radii, head_dim)
    num_directions = num_rows // self.num_radii
    directions = orthogonal_directions(rng, num_directions, head_dim)
    radii = jnp.asarray(np.sqrt(2.0 * halves), jnp.float32)
    w = radii[None, :, None] * directions[:, None, :]
    log_weight = np.tile(np.log(self.num_radii * weights), num_directions)
    return {
      "w": jnp.reshape(w, (num_rows, head_dim)),
      "log_weight": jnp.asarray(log_weight, jnp.float32),
    }


@functools.lru_cache
def gauss_laguerre(num_nodes: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the Gauss rule for the law of ``|w|^2 / 2`` with w of N(0, I_dim).

  This law is the Gamma law of shape dim / 2. The nodes are the eigenvalues of
  the Jacobi matrix of its orthogonal polynomials (Golub and Welsch 1969).

  Returns:
    Nodes, and weights that sum to 1: ``[num_nodes]`` float64, read-only.

  Example:
    >>> nodes, weights = gauss_laguerre(2, 8)
    >>> [round(float(nodes**power @ weights), 6) for power in (0, 1, 2)]
    [1.0, 4.0, 20.0]
  """
  k = np.arange(num_nodes)
  diagonal = 2.0 * k + dim / 2.0
  off_diagonal = np.sqrt(k[1:] * (k[1:] + dim / 2.0 - 1.0))
  upper = np.diag(off_diagonal, 1)
  jacobi = np.diag(diagonal) + upper + upper.T
  nodes, vectors = np.linalg.eigh(jacobi)
  return pieces.read_only(nodes), pieces.read_only(vectors[0] ** 2)


def _sphere_nodes(
  rng: Array, num_nodes: int, dim: int, symmetric: bool
) -> Array:
  """Draws rotated simplices on spheres, as nodes ``[num_nodes, dim]``.

  The radii are independent, of the chi law with dim + 2 degrees of freedom.
  """
  corners = pieces.simplex(dim + 1, dim)
  if symmetric:
    corners = np.stack([corners, -corners], axis=1).reshape(-1, dim)

  def draw_block(rng: Array, num_blocks: int) -> Array:
    rotation_rng, radius_rng = jax.random.split(rng)
    rotations = pieces.haar(rotation_rng, num_blocks, dim)
    radii = pieces.chi_norms(radius_rng, num_blocks, dim + 2)
    nodes = jnp.einsum("vh,bhk->bvk", corners, rotations, precision="highest")
    return radii[:, None, None] * nodes

  return base.draw_blocks(draw_block, rng, num_nodes, len(corners))
