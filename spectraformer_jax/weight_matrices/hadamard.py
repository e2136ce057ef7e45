"""Rows of products of Hadamard matrices and random signs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.registry import check_choice, check_int
from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices import base, pieces
from spectraformer_jax.weight_matrices.row_laws import open_uniform

CIRCLE_FACTORS = ("outermost", "innermost")


def hadamard_product(signs: Array) -> Array:
  r"""Returns the orthogonal matrices :math:`H D_1 H D_2 \cdots H D_k`.

  Args:
    signs: ``[..., k, n]`` float32: the diagonals, in the order of the formula.
      Usually -1 and +1; the formula holds for any numbers.

  Returns:
    ``[..., n, n]``.

  Example:
    >>> q = hadamard_product(jnp.ones((2, 4)))  # H H
    >>> bool(jnp.allclose(q, jnp.eye(4), atol=1e-6))
    True
  """
  n = signs.shape[-1]
  table = jnp.broadcast_to(pieces.hadamard(n), (*signs.shape[:-2], n, n))
  product = table * signs[..., -1, None, :]
  for i in range(signs.shape[-2] - 2, -1, -1):
    product = signs[..., i, :, None] * product
    product = jnp.matmul(table, product, precision="highest")
  return product


def _drop_columns(rng: Array, norms: str, rows: Array, head_dim: int) -> Array:
  """Keeps the first head_dim columns; if norms="chi", then draws new norms."""
  rows = rows[:, :head_dim]
  return pieces.chi_rows(rng, rows) if norms == "chi" else rows


@base.WEIGHT_MATRICES.register("rom")
@dataclasses.dataclass(frozen=True)
class ROM(base.GaussianRows):
  r"""Random orthogonal matrices, S-Rademacher: Hadamards with random signs.

  .. math::
    W_b = \sqrt n\, H D_1 H D_2 \cdots H D_k

  H: the Hadamard matrix divided by :math:`\sqrt n`; D: independent diagonals of
  random signs; n: the least power of two that is at least head_dim. Columns
  beyond head_dim are dropped. Mean and covariance of a row are exactly 0 and I.
  The rows of a block are orthogonal if head_dim = n; otherwise they are not,
  and their norms vary.

  Args:
    num_factors: k >= 2; 3 is "sorf" and the usual choice. With a single factor
      all rows would have the same product, plus or minus |x|, with an input x
      along an axis.
    norms: "sqrt_d": rows as they are, of norm sqrt(head_dim) (in the mean
      square, if head_dim < n); estimates have about the mean given at
      "orf_sqrtd". "chi": norms of independent Gaussian rows, which leave almost
      no bias (the directions are not quite uniform).

  Raises:
    ValueError: `num_factors` is not an integer >= 2; unknown `norms`.

  References:
    Choromanski, Rowland and Weller, The Unreasonable Effectiveness of
    Structured Random Orthogonal Embeddings, 2017, section 2
    (1703.00864).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.compose(
    ...   sf.components.TrigRF(), ROM(num_factors=2), num_features=8
    ... )
    >>> w = fm.init(jax.random.key(0), head_dim=8).projection["rows"]["w"][0]
    >>> bool(jnp.allclose(w @ w.T, 8 * jnp.eye(8), atol=1e-4))
    True
  """

  num_factors: int = 3
  norms: str = "sqrt_d"

  info = base.WeightMatrixInfo(
    name="rom",
    group="geometric",
    marginals="approximate",
    source="Choromanski et al. 2017, section 2",
    summary="products of Hadamard matrices and random signs",
    good_for="as orf_sqrtd (norms sqrt_d) or orf (chi); the cheapest redraw",
    constraint="any num_features, any head_dim (padded to a power of two)",
    cost="k M random signs, k - 1 products of n x n matrices per block",
    variance="as orf_sqrtd (norms sqrt_d) or orf (chi)",
  )

  def __post_init__(self) -> None:
    check_int("num_factors", self.num_factors, 2)
    pieces.check_norms(self.norms)

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    sign_rng, norm_rng = jax.random.split(rng)
    n = pieces.next_power_of_two(head_dim)

    def draw_block(rng: Array, num_blocks: int) -> Array:
      signs = pieces.random_signs(rng, (num_blocks, self.num_factors, n))
      return np.float32(np.sqrt(n)) * hadamard_product(signs)

    rows = base.draw_blocks(draw_block, sign_rng, num_rows, n)
    return _drop_columns(norm_rng, self.norms, rows, head_dim)


@base.WEIGHT_MATRICES.register("sorf")
@dataclasses.dataclass(frozen=True)
class SORF(ROM):
  r"""Structured orthogonal random features: three Hadamards, random signs.

  .. math::
    W_b = \sqrt n\, H D_1 H D_2 H D_3

  `ROM` with its option `num_factors` fixed to 3. It is as accurate as
  "orf_sqrtd" (norms "sqrt_d") or "orf" (norms "chi"); its directions need
  random signs alone.

  Args:
    norms: "sqrt_d": rows as they are; "chi": norms of independent Gaussian
      rows, which leave almost no bias.

  Raises:
    ValueError: unknown `norms`.

  References:
    Yu et al., Orthogonal Random Features, 2016, section 4 (1610.09072).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "sorf", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=8).projection["rows"]["w"][0]
    >>> bool(jnp.allclose(w @ w.T, 8 * jnp.eye(8), atol=1e-4))
    True
  """

  num_factors: int = dataclasses.field(default=3, init=False)

  facts = dataclasses.replace(
    ROM.info,
    name="sorf",
    source="Yu et al. 2016, section 4",
    summary="H D H D H D: Hadamard matrices and random signs",
    cost="3 M random signs, two products of n x n matrices per block",
    variance="trig 0.41, pos 0.38 at scale 0.2, H=32, M=128",
  )

  def _info(self) -> base.WeightMatrixInfo:
    if self.norms == "sqrt_d":
      return self.facts
    variance = "trig 0.38, pos 0.79 at scale 0.2, H=32"
    return dataclasses.replace(self.facts, variance=variance)

  info = base.info_from_options(_info)


@base.WEIGHT_MATRICES.register("rom_hybrid")
@dataclasses.dataclass(frozen=True)
class ROMHybrid(base.GaussianRows):
  r"""Random orthogonal matrices, S-Hybrid: one diagonal of complex units.

  .. math::
    W_b = \sqrt 2 \begin{pmatrix} \mathrm{Re}\, B \\ \mathrm{Im}\, B
    \end{pmatrix}, \qquad B = \sqrt n\, H D_U H D_1 H D_2
    \text{ or } \sqrt n\, H D_1 H D_2 H D_U

  :math:`D_U` has entries :math:`e^{2 \pi i u}` with uniform u, the other
  diagonals have random signs; H and n are as in `ROM`. A complete block has 2 n
  rows with :math:`W_b^\top W_b = 2 n I`, but the rows are not orthogonal to one
  another. So the variance is much lower only with M >= 2 n (for trigonometric
  maps 0.39 of that of independent rows at scale 0.2, H = 32; 0.85 with half a
  block).

  Args:
    norms: "sqrt_d": rows as they are, of norm sqrt(head_dim) in the mean
      square; "chi": norms of independent Gaussian rows.
    circle_factor: position of :math:`D_U`: "outermost" (first formula) or
      "innermost" (second). In the second formula an input along an axis is
      multiplied by one phase only: the bias of the trigonometric estimate is up
      to 0.09 at |x - y|^2 = 2, instead of 0.01.

  Raises:
    ValueError: unknown `norms` or `circle_factor`.

  References:
    Choromanski, Rowland and Weller, The Unreasonable Effectiveness of
    Structured Random Orthogonal Embeddings, 2017, section 2 (1703.00864).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "rom_hybrid", num_features=16)
    >>> w = fm.init(jax.random.key(0), head_dim=8).projection["rows"]["w"][0]
    >>> bool(jnp.allclose(w.T @ w, 16 * jnp.eye(8), atol=1e-4))
    True
  """

  norms: str = "sqrt_d"
  circle_factor: str = "outermost"

  facts = dataclasses.replace(
    ROM.info,
    name="rom_hybrid",
    summary="real and imaginary parts of a unitary Hadamard product",
    good_for="trigonometric maps with M >= 2 n; otherwise sorf is better",
    constraint="any num_features (best a multiple of 2 n), any head_dim "
    "(padded to a power of two n)",
    cost="3 M / 2 draws, four products of n x n matrices per block",
    variance="trig 0.39, pos 0.44 at scale 0.2, H=32, M=128",
  )

  def __post_init__(self) -> None:
    pieces.check_norms(self.norms)
    check_choice("circle_factor", self.circle_factor, CIRCLE_FACTORS)

  def _info(self) -> base.WeightMatrixInfo:
    if self.norms == "sqrt_d":
      return self.facts
    variance = "trig 0.38, pos 0.84 at scale 0.2, H=32, M=128"
    return dataclasses.replace(self.facts, variance=variance)

  info = base.info_from_options(_info)

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    block_rng, norm_rng = jax.random.split(rng)
    n = pieces.next_power_of_two(head_dim)

    def draw_block(rng: Array, num_blocks: int) -> Array:
      sign_rng, phase_rng = jax.random.split(rng)
      signs = pieces.random_signs(sign_rng, (num_blocks, 2, n))
      phase = 2.0 * np.pi * open_uniform(phase_rng, (num_blocks, 1, n))
      circle = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1)
      # The formula is linear in D_U = cos + i sin: with the cosines in its
      # place it gives the real part of B, with the sines the imaginary part.
      shared = jnp.broadcast_to(signs[:, None], (num_blocks, 2, 2, n))
      factors = [circle[:, :, None, :], shared]
      if self.circle_factor == "innermost":
        factors.reverse()
      product = hadamard_product(jnp.concatenate(factors, axis=2))
      return np.float32(np.sqrt(2.0 * n)) * product

    rows = base.draw_blocks(draw_block, block_rng, num_rows, 2 * n)
    return _drop_columns(norm_rng, self.norms, rows, head_dim)
