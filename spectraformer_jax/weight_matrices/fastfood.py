"""Fastfood: rows from two Hadamard matrices and diagonals, drawn or learnt."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.typing import Array, Params, Projection, WeightSample
from spectraformer_jax.weight_matrices import base, learners, pieces
from spectraformer_jax.weight_matrices.row_laws import RowLaw


def fastfood_blocks(
  scales: Array, gaussian: Array, permutation: Array, signs: Array
) -> Array:
  r"""Multiplies two Hadamard matrices, three diagonals and a permutation.

  .. math::
    \sqrt n\, \mathrm{diag}(s)\, H\, \mathrm{diag}(g)\, P\, H\, \mathrm{diag}(b)

  H is the Hadamard matrix divided by :math:`\sqrt n`.

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
  table = jnp.asarray(pieces.hadamard(n))
  inner = gaussian[..., None] * table[permutation] * signs[:, None, :]
  outer = (np.float32(np.sqrt(n)) * scales)[..., None] * table[None]
  return jnp.matmul(outer, inner, precision="highest")


@base.WEIGHT_MATRICES.register("fastfood")
@dataclasses.dataclass(frozen=True)
class FastFood(base.GaussianRows):
  r"""Fastfood: Gaussian rows from Hadamard matrices and diagonals.

  .. math::
    W_b = \sqrt n\, \mathrm{diag}(s / |g|)\, H\, \mathrm{diag}(g)\, P\, H\,
    \mathrm{diag}(b), \quad g \sim N(0, I_n), \quad s_i \sim \chi_n

  b: random signs; P: a random permutation; H: the Hadamard matrix divided by
  :math:`\sqrt n`; n: the least power of two that is at least head_dim. Columns
  beyond head_dim are dropped. Each row alone is exactly N(0, I), but rows of a
  block are similar (their mean squared cosine is 2/(n+2), that of independent
  rows 1/n), so the variance is larger than that of independent rows. The fast
  transform, for which the construction was made, is not faster than a dense
  product at usual head dims.

  References:
    Le, Sarlos and Smola, Fastfood: Approximating Kernel Expansions in
    Loglinear Time, 2013 (1408.3060).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "fastfood", num_features=16)
    >>> fm.init(jax.random.key(0), head_dim=6).projection["rows"]["w"].shape
    (1, 16, 6)
  """

  info = base.WeightMatrixInfo(
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

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    n = pieces.next_power_of_two(head_dim)

    def draw_block(rng: Array, num_blocks: int) -> Array:
      scale_rng, gaussian_rng, place_rng, sign_rng = jax.random.split(rng, 4)
      shape = (num_blocks, n)
      scales = pieces.chi_norms(scale_rng, num_blocks * n, n).reshape(shape)
      gaussian = pieces.normal(gaussian_rng, shape)
      length = jnp.sqrt(jnp.sum(jnp.square(gaussian), axis=-1, keepdims=True))
      permutation = pieces.random_permutations(place_rng, shape)
      signs = pieces.random_signs(sign_rng, shape)
      return fastfood_blocks(scales, gaussian / length, permutation, signs)

    return base.draw_blocks(draw_block, rng, num_rows, n)[:, :head_dim]


@base.WEIGHT_MATRICES.register("fastfood_learnable")
@dataclasses.dataclass(frozen=True)
class FastFoodLearnable(base.WeightMatrix):
  r"""Fastfood with three learnable diagonals: 3 numbers per row instead of H.

  .. math::
    W_b = \sqrt n\, \mathrm{diag}(s)\, H\, \mathrm{diag}(g)\, P\, H\,
    \mathrm{diag}(b)

  H: the Hadamard matrix divided by :math:`\sqrt n`; P: a permutation that is
  drawn once and saved with the model, since the learnt diagonals fit no other;
  n: the least power of two that is at least head_dim. Columns beyond head_dim
  are dropped. The diagonals start as those of "fastfood", so each row starts as
  exactly N(0, I).

  There is no noise to redraw: the map learns M frequencies, not a distribution
  of frequencies. Parameters are "s" ``[M]``, "g" ``[blocks, n]`` and "b"
  ``[blocks, head_dim]``. Entries that only affect dropped rows or columns are
  left out, so that every parameter has a gradient.

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

  info = learners.learner_facts(
    name="fastfood_learnable",
    source="Yang et al. 2014 (1412.6493)",
    summary="fastfood with learnable diagonals",
    good_for="a kernel learnt with few parameters; all components",
    constraint="any num_features, any head_dim (padded to a power of two)",
    cost="a product of n x n matrices per block, at every step",
    variance="at the start as fastfood: trig 1.6, pos 1.1 at scale 0.2, H=32",
    redrawable=False,
  )

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    scale_rng, gaussian_rng, sign_rng = jax.random.split(rng, 3)
    num_blocks, n = _block_shape(num_rows, head_dim)
    gaussian = pieces.normal(gaussian_rng, (num_blocks, n))
    length = jnp.sqrt(jnp.sum(jnp.square(gaussian), axis=-1))
    scales = pieces.chi_norms(scale_rng, num_rows, n)
    return {
      "s": scales / jnp.repeat(length, n)[:num_rows],
      "g": gaussian,
      "b": pieces.random_signs(sign_rng, (num_blocks, head_dim)),
    }

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    shape = _block_shape(num_rows, head_dim)
    return {"permutation": pieces.random_permutations(rng, shape)}

  @override
  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    s, g, b = params["s"], params["g"], params["b"]
    (num_rows,), (num_blocks, n), head_dim = s.shape, g.shape, b.shape[-1]
    scales = jnp.pad(s, (0, num_blocks * n - num_rows)).reshape(num_blocks, n)
    signs = jnp.pad(b, ((0, 0), (0, n - head_dim)))
    permutation = projection["permutation"].astype(jnp.int32)
    stacked = fastfood_blocks(scales, g, permutation, signs)
    return WeightSample(stacked.reshape(-1, n)[:num_rows, :head_dim])


def _block_shape(num_rows: int, head_dim: int) -> tuple[int, int]:
  """Returns the number of blocks and n, the number of rows of each."""
  n = pieces.next_power_of_two(head_dim)
  return -(-num_rows // n), n
