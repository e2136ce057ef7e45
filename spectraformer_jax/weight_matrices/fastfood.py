"""Fastfood: Gaussian rows from two Hadamard matrices and diagonals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
  draw_blocks,
)
from spectraformer_jax.weight_matrices.building_blocks import (
  chi_norms,
  hadamard,
  next_power_of_two,
)


def fastfood_blocks(
  scales: Array, gaussian: Array, permutation: Array, signs: Array
) -> Array:
  r"""Products of two Hadamard matrices, three diagonals and a permutation.

  .. math::
    \sqrt n\, \mathrm{diag}(s)\, H\, \mathrm{diag}(g)\, P\, H\, \mathrm{diag}(b)

  Args:
    scales: s ``[blocks, n]`` float32.
    gaussian: g ``[blocks, n]`` float32.
    permutation: ``[blocks, n]`` int32: P moves entry permutation[i] to i.
    signs: b ``[blocks, n]`` float32.

  Returns:
    ``[blocks, n, n]``.

  Example:
    >>> one = jnp.ones((1, 4))
    >>> w = fastfood_blocks(one, one, jnp.arange(4)[None], one)  # 2 H H
    >>> bool(jnp.allclose(w[0], 2 * jnp.eye(4), atol=1e-6))
    True
  """
  n = signs.shape[-1]
  table = jnp.asarray(hadamard(n))
  inner = gaussian[..., None] * table[permutation] * signs[:, None, :]
  outer = (np.float32(np.sqrt(n)) * scales)[..., None] * table[None]
  return jnp.matmul(outer, inner, precision="highest")


@WEIGHT_MATRICES.register("fastfood")
@dataclasses.dataclass(frozen=True)
class FastFood(WeightMatrix):
  r"""Fastfood: Gaussian rows out of Hadamard matrices and diagonals.

  .. math::
    W_b = \sqrt n\, \mathrm{diag}(s / |g|)\, H\, \mathrm{diag}(g)\, P\, H\,
    \mathrm{diag}(b), \quad g \sim N(0, I_n), \quad s_i \sim \chi_n

  b: random signs; P: a random permutation; H: the Hadamard matrix over
  :math:`\sqrt n`; n: the power of two at or above H, whose last columns are
  dropped. Each row alone is exactly N(0, I), but rows of a block are alike
  (their mean squared cosine is 2/(n+2), that of independent ones 1/n): more
  variance than independent rows. The construction was made for speed, which a
  dense product makes moot at usual head dims.

  References:
    Le, Sarlos and Smola, Fastfood: Approximating Kernel Expansions in
    Loglinear Time, 2013 (1408.3060).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "fastfood", num_features=16)
    >>> fm.init(jax.random.key(0), head_dim=6).projection["rows"]["w"].shape
    (1, 16, 6)
  """

  info = WeightMatrixInfo(
    name="fastfood",
    group="structural",
    marginals="exact",
    source="Le, Sarlos and Smola 2013 (1408.3060)",
    summary="Gaussian rows from Hadamard matrices and random diagonals",
    good_for="comparison; the start of fastfood_learnable",
    constraint="any num_features, any head_dim (padded to a power of two)",
    cost="3 M draws, a permutation and a product of n x n matrices per block",
    variance="trig 1.6, pos 1.1 at scale 0.2; trig 1.8 at 0.1; H=32",
  )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    n = next_power_of_two(head_dim)

    def draw_block(rng, num_blocks):
      scale_rng, gaussian_rng, order_rng, sign_rng = jax.random.split(rng, 4)
      shape = (num_blocks, n)
      scales = jnp.reshape(chi_norms(scale_rng, num_blocks * n, n), shape)
      gaussian = jax.random.normal(gaussian_rng, shape, dtype=jnp.float32)
      length = jnp.sqrt(jnp.sum(jnp.square(gaussian), axis=-1, keepdims=True))
      permutation = jax.random.permutation(
        order_rng,
        jnp.broadcast_to(jnp.arange(n), shape),
        axis=-1,
        independent=True,
      )
      signs = jax.random.rademacher(sign_rng, shape, jnp.float32)
      return fastfood_blocks(scales, gaussian / length, permutation, signs)

    return {"w": draw_blocks(draw_block, rng, num_rows, n)[:, :head_dim]}
