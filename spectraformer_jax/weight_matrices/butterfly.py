"""Orthogonal rows from layers of plane rotations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.building_blocks import (
  check_norms,
  next_power_of_two,
  rescale_rows,
)
from spectraformer_jax.weight_matrices.row_laws import open_uniform

STAGES = 3


def butterfly_matrix(signs: Array, permutation: Array, angles: Array) -> Array:
  r"""The orthogonal matrix :math:`B_3 P_3 D_3\, B_2 P_2 D_2\, B_1 P_1 D_1`.

  Layer l of a butterfly B turns the planes of the axes i and i + 2^l.

  Args:
    signs: ``[3, n]`` float32, diagonals of D.
    permutation: ``[3, n]`` int32: P moves entry permutation[i] to i.
    angles: ``[3, log2 n, n/2]`` float32, radians.

  Returns:
    ``[n, n]`` float32.

  Example:
    >>> order = jnp.tile(jnp.arange(4), (3, 1))
    >>> q = butterfly_matrix(jnp.ones((3, 4)), order, jnp.zeros((3, 2, 2)))
    >>> bool((q == jnp.eye(4)).all())
    True
  """
  n = signs.shape[-1]
  matrix = jnp.eye(n, dtype=jnp.float32)
  for stage in range(signs.shape[0]):
    matrix = (signs[stage][:, None] * matrix)[permutation[stage]]
    for layer in range(angles.shape[1]):
      half = 1 << layer
      planes = jnp.reshape(matrix, (-1, 2, half, n))
      turn = jnp.reshape(angles[stage, layer], (-1, half, 1))
      cos, sin = jnp.cos(turn), jnp.sin(turn)
      low, high = planes[:, 0], planes[:, 1]
      planes = jnp.stack([cos * low - sin * high, sin * low + cos * high], 1)
      matrix = jnp.reshape(planes, (n, n))
  return matrix


@WEIGHT_MATRICES.register("butterfly")
@dataclasses.dataclass(frozen=True)
class Butterfly(WeightMatrix):
  r"""Butterfly matrices: random plane rotations in log2(n) layers.

  .. math::
    W_b = \mathrm{diag}(r)\, B_3 P_3 D_3\, B_2 P_2 D_2\, B_1 P_1 D_1, \quad
    r_m \sim \chi_H

  D: random signs; P: random permutations; B: log2(n) layers of n/2 rotations of
  planes by uniform angles; n: the power of two at or above H, whose last
  columns are dropped. Exactly orthogonal blocks where head_dim = n, of nearly
  uniform directions: errors as with `ORF`, bias of about 0.01 at most.

  Args:
    norms: "chi": fresh norms of Gaussian rows; "sqrt_d": rows of norm sqrt(H)
      (in the mean square, if head_dim < n), with about the mean given at
      "orf_sqrtd".
    learnable: the angles are parameters, which start at a random draw: blocks
      stay orthogonal whatever they become. Not redrawable then.

  Raises:
    ValueError: unknown `norms`.

  References:
    Munkhoeva et al., Quadrature-based Features for Kernel Approximation, 2018
    (1802.03832); Dao et al., Learning Fast Algorithms for Linear
    Transforms Using Butterfly Factorizations, 2019 (1903.05895).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "butterfly", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=8).projection["rows"]["w"][0]
    >>> bool(abs(w[0] @ w[1]) < 1e-4)
    True
  """

  norms: str = "chi"
  learnable: bool = False

  def __post_init__(self):
    check_norms(self.norms)

  @property
  def info(self):
    """Facts; some depend on `learnable`, the variance on `norms`."""
    return WeightMatrixInfo(
      name="butterfly",
      group="geometric",
      marginals="approximate",
      source="Munkhoeva et al. 2018 (1802.03832)",
      summary="orthogonal blocks of log2(n) layers of plane rotations",
      good_for="as orf (norms chi) or orf_sqrtd; learnable orthogonal rows",
      constraint="any num_features, any head_dim (padded to a power of two)",
      cost="3 M (log2(n) / 2 + 1) draws, 3 M n log2(n) flops",
      variance="trig 0.38, pos 0.77 at scale 0.2, H=32"
      if self.norms == "chi"
      else "as orf_sqrtd",
      learnable=self.learnable,
      redrawable=not self.learnable,
    )

  def init(self, rng, num_rows, head_dim):
    """Angles ``[blocks, 3, log2 n, n/2]`` if learnable."""
    if not self.learnable:
      return {}
    return {"angles": self._angles(rng, num_rows, head_dim)}

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`; signs and permutations if learnable."""
    del law  # Gaussian only
    sign_rng, order_rng, norm_rng, angle_rng = jax.random.split(rng, 4)
    n = next_power_of_two(head_dim)
    shape = (-(-num_rows // n), STAGES, n)
    order = jnp.broadcast_to(jnp.arange(n), shape)
    drawn = {
      "signs": jax.random.rademacher(sign_rng, shape, jnp.float32),
      "permutation": jax.random.permutation(
        order_rng, order, axis=-1, independent=True
      ),
      "w": jax.random.normal(norm_rng, (num_rows, head_dim), dtype=jnp.float32),
    }
    if self.learnable:
      return drawn
    angles = self._angles(angle_rng, num_rows, head_dim)
    return {"w": self._turn(drawn, angles)}

  def rows(self, params, projection, context=()):
    """See `WeightMatrix.rows`."""
    if self.learnable:
      projection = {"w": self._turn(projection, params["angles"])}
    return super().rows(params, projection, context)

  def _angles(self, rng, num_rows, head_dim):
    """Uniform angles of all blocks."""
    n = next_power_of_two(head_dim)
    shape = (-(-num_rows // n), STAGES, n.bit_length() - 1, n // 2)
    return 2.0 * np.pi * open_uniform(rng, shape)

  def _turn(self, drawn, angles):
    """Rows ``[M, H]``; leaf "w" is the Gaussian matrix that norms are from."""
    signs, order = drawn["signs"], drawn["permutation"].astype(jnp.int32)
    blocks = jax.vmap(butterfly_matrix)(signs, order, angles)
    num_rows, head_dim = drawn["w"].shape
    n = signs.shape[-1]
    rows = jnp.reshape(blocks, (-1, n))[:num_rows, :head_dim]
    if self.norms == "chi":
      return rescale_rows(rows, drawn["w"])
    return np.float32(np.sqrt(n)) * rows
