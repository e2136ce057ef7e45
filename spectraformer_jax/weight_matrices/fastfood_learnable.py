"""Fastfood with learnable diagonals."""

import dataclasses

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import WeightSample
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.building_blocks import (
  chi_norms,
  next_power_of_two,
)
from spectraformer_jax.weight_matrices.fastfood import fastfood_blocks


@WEIGHT_MATRICES.register("fastfood_learnable")
@dataclasses.dataclass(frozen=True)
class FastFoodLearnable(WeightMatrix):
  r"""Fastfood whose three diagonals are learnt: 3 numbers a row, not H.

  .. math::
    W_b = \sqrt n\, \mathrm{diag}(s)\, H\, \mathrm{diag}(g)\, P\, H\,
    \mathrm{diag}(b)

  H: the Hadamard matrix over :math:`\sqrt n`; P: a permutation, drawn once and
  saved with the model, as the diagonals mean nothing without it; n: the power
  of two at or above head_dim, whose last columns are dropped. The diagonals
  start as those of "fastfood", so each row starts as exactly N(0, I).

  The parameters are the matrix: there is no noise to draw again, and the kernel
  is that of M learnt frequencies. Parameters "s" ``[M]``, "g" ``[blocks, n]``
  and "b" ``[blocks, H]``: entries that only reach dropped rows or columns are
  left out, so that every one has a gradient.

  References:
    Yang, Smola, Song and Wilson, A la Carte: Learning Fast Kernels, 2014
    (1412.6493); Chowdhury et al., On Learning the Transformer Kernel, 2021
    (2110.08323), FastFood-RKS.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "fastfood_learnable", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6)
    >>> {name: leaf.shape for name, leaf in v.params["rows"].items()}
    {'b': (1, 2, 6), 'g': (1, 2, 8), 's': (1, 16)}
    >>> v.projection["rows"]["permutation"].shape
    (1, 2, 8)
  """

  info = WeightMatrixInfo(
    name="fastfood_learnable",
    group="learner",
    marginals="exact",
    source="Yang et al. 2014 (1412.6493)",
    summary="fastfood with learnable diagonals",
    good_for="a kernel learnt with few parameters; all components",
    constraint="any num_features, any head_dim (padded to a power of two)",
    cost="a product of n x n matrices per block, at every step",
    variance="at the start as fastfood: trig 1.6, pos 1.1 at scale 0.2, H=32",
    learnable=True,
    redrawable=False,
  )

  def init(self, rng, num_rows, head_dim):
    """See `WeightMatrix.init`."""
    scale_rng, gaussian_rng, sign_rng = jax.random.split(rng, 3)
    blocks, n = _block_shape(num_rows, head_dim)
    gaussian = jax.random.normal(gaussian_rng, (blocks, n), dtype=jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(gaussian), axis=-1))
    scales = chi_norms(scale_rng, num_rows, n)
    return {
      "s": scales / jnp.repeat(length, n)[:num_rows],
      "g": gaussian,
      "b": jax.random.rademacher(sign_rng, (blocks, head_dim), jnp.float32),
    }

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`: leaf "permutation" ``[blocks, n]``."""
    del law  # Gaussian only
    shape = _block_shape(num_rows, head_dim)
    order = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    return {
      "permutation": jax.random.permutation(
        rng, order, axis=-1, independent=True
      )
    }

  def rows(self, params, projection, context=()):
    """See `WeightMatrix.rows`."""
    del context
    s, g, b = params["s"], params["g"], params["b"]
    (num_rows,), (blocks, n), head_dim = s.shape, g.shape, b.shape[-1]
    scales = jnp.pad(s, (0, blocks * n - num_rows)).reshape(blocks, n)
    signs = jnp.pad(b, ((0, 0), (0, n - head_dim)))
    order = projection["permutation"].astype(jnp.int32)
    stacked = fastfood_blocks(scales, g, order, signs)
    return WeightSample(stacked.reshape(blocks * n, n)[:num_rows, :head_dim])


def _block_shape(num_rows: int, head_dim: int) -> tuple[int, int]:
  """Number of blocks, and their size."""
  n = next_power_of_two(head_dim)
  return -(-num_rows // n), n
