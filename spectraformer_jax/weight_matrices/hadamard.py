"""Rows of products of Hadamard matrices and random signs."""

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
  check_norms,
  chi_rows,
  hadamard,
  next_power_of_two,
)
from spectraformer_jax.weight_matrices.row_laws import open_uniform

CIRCLE_FACTORS = ("outermost", "innermost")
PADDING = "any num_features, any head_dim (padded to a power of two)"


def hadamard_product(signs: Array) -> Array:
  r"""The orthogonal matrices :math:`H D_1 H D_2 \cdots H D_k`.

  Args:
    signs: ``[..., k, n]`` float32, diagonals in order of the formula (a row of
      +1 and -1 each; any unit diagonal works).

  Returns:
    ``[..., n, n]``.

  Example:
    >>> q = hadamard_product(jnp.ones((2, 4)))  # H H
    >>> bool(jnp.allclose(q, jnp.eye(4), atol=1e-6))
    True
  """
  n = signs.shape[-1]
  table = jnp.broadcast_to(hadamard(n), (*signs.shape[:-2], n, n))
  product = table * signs[..., -1, None, :]
  for i in range(signs.shape[-2] - 2, -1, -1):
    product = signs[..., i, :, None] * product
    product = jnp.matmul(table, product, precision="highest")
  return product


def _finish(rng, norms, blocks, head_dim):
  """Drops the columns past head_dim; fresh norms if asked for."""
  rows = blocks[:, :head_dim]
  return chi_rows(rng, rows) if norms == "chi" else rows


@WEIGHT_MATRICES.register("rom")
@dataclasses.dataclass(frozen=True)
class ROM(WeightMatrix):
  r"""Random orthogonal matrices, S-Rademacher: k sign-randomised Hadamards.

  .. math::
    W_b = \sqrt n\, H D_1 H D_2 \cdots H D_k

  H: Hadamard matrix over :math:`\sqrt n`; D: independent diagonals of random
  signs; n: the power of two at or above H, whose last columns are dropped.
  Mean and covariance of a row are exact. Where head_dim = n, rows of a block
  are orthogonal; where it is not, they are not, and norms vary.

  Args:
    num_factors: k >= 2; 3 is "sorf" and the usual choice. With a single factor
      an input along an axis would see plus or minus its norm in every row.
    norms: "sqrt_d": rows as they are, of norm sqrt(head_dim) (in the mean
      square, if head_dim < n), with about the mean given at "orf_sqrtd";
      "chi": fresh norms of Gaussian rows, of almost no bias (directions are
      still not quite uniform).

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

  def __post_init__(self):
    k = self.num_factors
    if isinstance(k, bool) or not isinstance(k, int) or k < 2:
      raise ValueError(
        f"num_factors must be an integer >= 2, got {k!r}; 3 is usual."
      )
    check_norms(self.norms)

  @property
  def info(self):
    """Facts."""
    return WeightMatrixInfo(
      name="rom",
      group="geometric",
      marginals="approximate",
      source="Choromanski et al. 2017, section 2",
      summary="products of Hadamard matrices and random signs",
      good_for="as orf_sqrtd (norms sqrt_d) or orf (chi); the cheapest redraw",
      constraint=PADDING,
      cost="k M random signs, k - 1 products of n x n matrices per block",
      variance="as orf_sqrtd (norms sqrt_d) or orf (chi)",
    )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    sign_rng, norm_rng = jax.random.split(rng)
    n = next_power_of_two(head_dim)

    def draw_block(rng, num_blocks):
      shape = (num_blocks, self.num_factors, n)
      signs = jax.random.rademacher(rng, shape, jnp.float32)
      return np.float32(np.sqrt(n)) * hadamard_product(signs)

    rows = draw_blocks(draw_block, sign_rng, num_rows, n)
    return {"w": _finish(norm_rng, self.norms, rows, head_dim)}


@WEIGHT_MATRICES.register("sorf")
@dataclasses.dataclass(frozen=True)
class SORF(WeightMatrix):
  r"""Structured orthogonal random features: three signed Hadamards.

  .. math::
    W_b = \sqrt n\, H D_1 H D_2 H D_3

  `ROM` with three factors; see there for what happens where head_dim is not a
  power of two. As good as "orf_sqrtd" (norms "sqrt_d") or "orf" (norms "chi"),
  from signs alone.

  Args:
    norms: "sqrt_d": rows as they are; "chi": fresh norms of Gaussian rows, of
      almost no bias.

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

  norms: str = "sqrt_d"

  def __post_init__(self):
    check_norms(self.norms)

  @property
  def info(self):
    """Facts; the variance depends on `norms`."""
    return dataclasses.replace(
      ROM().info,
      name="sorf",
      source="Yu et al. 2016, section 4",
      summary="H D H D H D: Hadamard matrices and random signs",
      cost="3 M random signs, two products of n x n matrices per block",
      variance="trig 0.38, pos 0.79 at scale 0.2, H=32"
      if self.norms == "chi"
      else "trig 0.41, pos 0.38 at scale 0.2, H=32, M=128",
    )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    return ROM(norms=self.norms).draw(rng, num_rows, head_dim, law)


@WEIGHT_MATRICES.register("rom_hybrid")
@dataclasses.dataclass(frozen=True)
class ROMHybrid(WeightMatrix):
  r"""Random orthogonal matrices, S-Hybrid: one factor on the unit circle.

  .. math::
    W_b = \sqrt 2 \begin{pmatrix} \mathrm{Re}\, B \\ \mathrm{Im}\, B
    \end{pmatrix}, \qquad B = \sqrt n\, H D_U H D_1 H D_2
    \text{ or } \sqrt n\, H D_1 H D_2 H D_U

  :math:`D_U` has entries :math:`e^{2 \pi i u}`, the others random signs. A
  complete block has 2 n rows with :math:`W_b^\top W_b = 2 n I`; they are not
  orthogonal to one another, so it pays only with M >= 2 n (a trigonometric
  factor of 0.39 at scale 0.2 against 0.85 with half a block, H = 32).

  Args:
    norms: "sqrt_d": rows as they are, of norm sqrt(head_dim) in the mean
      square; "chi": fresh norms of Gaussian rows.
    circle_factor: where :math:`D_U` stands: "outermost", the first formula, or
      "innermost", the second. Innermost, an input along an axis meets one phase
      alone: a bias of the trigonometric estimate of up to 0.09 at
      |x - y|^2 = 2, not 0.01.

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

  def __post_init__(self):
    check_norms(self.norms)
    if self.circle_factor not in CIRCLE_FACTORS:
      raise ValueError(
        f"circle_factor must be one of {CIRCLE_FACTORS}, got "
        f"{self.circle_factor!r}."
      )

  @property
  def info(self):
    """Facts; the variance depends on `norms`."""
    return WeightMatrixInfo(
      name="rom_hybrid",
      group="geometric",
      marginals="approximate",
      source="Choromanski et al. 2017, section 2",
      summary="real and imaginary parts of a unitary Hadamard product",
      good_for="trigonometric maps with M >= 2 n; otherwise sorf is better",
      constraint="any num_features (best a multiple of 2 n), any head_dim "
      "(padded to a power of two n)",
      cost="3 M / 2 draws, four products of n x n matrices per block",
      variance="trig 0.38, pos 0.84 at scale 0.2, H=32, M=128"
      if self.norms == "chi"
      else "trig 0.39, pos 0.44 at scale 0.2, H=32, M=128",
    )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    block_rng, norm_rng = jax.random.split(rng)
    n = next_power_of_two(head_dim)

    def draw_block(rng, num_blocks):
      sign_rng, phase_rng = jax.random.split(rng)
      signs = jax.random.rademacher(sign_rng, (num_blocks, 2, n), jnp.float32)
      phase = 2.0 * np.pi * open_uniform(phase_rng, (num_blocks, 1, n))
      circle = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1)
      # Real and imaginary part: with the cosines, and with the sines, as D_U.
      shared = jnp.broadcast_to(signs[:, None], (num_blocks, 2, 2, n))
      factors = [circle[:, :, None, :], shared]
      if self.circle_factor == "innermost":
        factors.reverse()
      product = hadamard_product(jnp.concatenate(factors, axis=2))
      return np.float32(np.sqrt(2.0 * n)) * product

    rows = draw_blocks(draw_block, block_rng, num_rows, 2 * n)
    return {"w": _finish(norm_rng, self.norms, rows, head_dim)}
