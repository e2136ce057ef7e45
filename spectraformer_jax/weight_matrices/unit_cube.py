"""Rows with exact sample moments, and Latin hypercubes."""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.typing import Array, Projection
from spectraformer_jax.weight_matrices import base, pieces
from spectraformer_jax.weight_matrices.row_laws import ENTRY_LAWS, RowLaw


@base.WEIGHT_MATRICES.register("mm")
@dataclasses.dataclass(frozen=True)
class MM(base.GaussianRows):
  r"""Moment matching: rows with mean exactly 0 and covariance exactly I.

  .. math::
    W = \sqrt{M}\, Q, \quad G - \bar G = Q R, \quad G_{mj} \sim N(0, 1)

  with Q of the reduced QR factorisation whose R has a positive diagonal. (Any
  root of the sample covariance whitens the rows to the same law; QR is better
  conditioned.) The variance is low for both trigonometric and positive maps
  once M >= 2 H. The bias falls like 1/M: the mean of trigonometric estimates is
  :math:`{}_0F_1(; (M-1)/2; -(M-1) s/4) \approx e^{-s/2}(1 - s^2/(4(M-1)))`,
  :math:`s = |x - y|^2`.

  References:
    Shen, Yang and Wang, Random Features for Shift-Invariant Kernels with
    Moment Matching, 2017, Algorithm 1.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "mm", num_features=16)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> bool(abs((w.T @ w / 16)[0, 0] - 1.0) < 1e-5)
    True
  """

  info = base.WeightMatrixInfo(
    name="mm",
    group="unit cube",
    marginals="approximate",
    source="Shen, Yang and Wang 2017, Algorithm 1",
    summary="sample mean 0 and sample covariance I, exactly",
    good_for="trigonometric and positive maps with M >= 2 H",
    constraint="num_features > head_dim",
    cost="one QR factorisation of M x H",
    variance="trig 0.38, pos 0.36 at scale 0.2, H=32, M=128",
  )

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    if num_rows <= head_dim:
      raise ValueError(
        f"weight matrix {self.info.name!r} needs num_features > head_dim, got "
        f"num_features={num_rows} and head_dim={head_dim}: use at least "
        f"{head_dim + 1} features, or 'orf'."
      )

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    return matched_rows(rng, num_rows, head_dim)


@base.WEIGHT_MATRICES.register("mm_chi")
@dataclasses.dataclass(frozen=True)
class MMChi(MM):
  r"""Moment matching with independent norms: exactly Gaussian rows.

  .. math::
    w_m = r_m q_m / |q_m|, \quad r_m \sim \chi_H

  with the rows q of `MM`. Their directions are uniform, so each row is exactly
  N(0, I) and every component stays unbiased. Most of the gain of `MM` remains.

  References:
    Shen, Yang and Wang 2017, Algorithm 1 (see `MM`), with the norms of Yu et
    al., Orthogonal Random Features, 2016, equation 4.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "mm_chi", num_features=16)
    >>> fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"].shape
    (1, 16, 4)
  """

  info = dataclasses.replace(
    MM.info,
    name="mm_chi",
    marginals="exact",
    source="Shen, Yang and Wang 2017, Algorithm 1; norms of Yu et al. 2016",
    summary="moment-matched directions with independent chi norms",
    good_for="trigonometric and positive maps with M >= 2 H, unbiased",
    variance="trig 0.39, pos 0.57 at scale 0.2, H=32, M=128",
  )

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    row_rng, norm_rng = jax.random.split(rng)
    rows = matched_rows(row_rng, num_rows, head_dim)
    norms = pieces.chi_norms(norm_rng, num_rows, head_dim)
    return pieces.set_norms(rows, norms)


@base.WEIGHT_MATRICES.register("mm_anti")
@dataclasses.dataclass(frozen=True)
class MMAnti(base.GaussianRows):
  r"""Moment-matched rows and their negatives, for positive maps.

  .. math::
    W = [B; -B], \quad B \text{ the rows of MM}

  Here B has M / 2 rows. Odd sample moments vanish as well. The bias is that of
  `MM` with M / 2 rows. With "posrf", H = 32 and M = 128, only "orf_sqrtd_anti",
  whose bias does not fall with M, had a lower measured error
  (docs/accuracy.md). Trigonometric and hyperbolic maps have equal features for
  a row and its negative: use `MM` for them.

  References:
    Shen, Yang and Wang 2017, Algorithm 1 (see `MM`), with antithetic pairs.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "mm_anti", num_features=16)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> bool(jnp.all(w[:8] == -w[8:]))
    True
  """

  info = dataclasses.replace(
    MM.info,
    name="mm_anti",
    source="Shen, Yang and Wang 2017, Algorithm 1; antithetic pairs",
    summary="moment-matched rows and their negatives",
    good_for="positive maps with one sign of a row and M >= 4 H; not "
    "trigonometric and hyperbolic ones, which lose half of the rows",
    antithetic=True,
    constraint="num_features >= 2 head_dim + 1; even is best",
    cost="one QR factorisation of M/2 x H",
    variance="trig 0.75, pos 0.19 at scale 0.2, H=32, M=128",
  )

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    if num_rows <= 2 * head_dim:
      raise ValueError(
        "weight matrix 'mm_anti' needs num_features > 2 head_dim, got "
        f"num_features={num_rows} and head_dim={head_dim}: use at least "
        f"{2 * head_dim + 1} features, or 'orf_antithetic'."
      )

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    half = matched_rows(rng, -(-num_rows // 2), head_dim)
    return pieces.antithetic_rows(half, num_rows)


def matched_rows(rng: Array, num_rows: int, head_dim: int) -> Array:
  """Draws rows ``[M, H]`` of sample mean 0 and sample covariance I; M > H."""
  gaussian = pieces.normal(rng, (num_rows, head_dim))
  centred = gaussian - jnp.mean(gaussian, axis=0, keepdims=True)
  with jax.default_matmul_precision("highest"):
    q, r = jnp.linalg.qr(centred)
  signs = jnp.where(jnp.diagonal(r) < 0.0, -1.0, 1.0)
  return jnp.sqrt(float(num_rows)) * q * signs[None, :]


@base.WEIGHT_MATRICES.register("lhs")
@dataclasses.dataclass(frozen=True)
class LHS(base.WeightMatrix):
  r"""Latin hypercube sampling: stratifies every column independently.

  .. math::
    W_{mj} = F^{-1}\big((\pi_j(m) + U_{mj}) / M\big), \quad
    U_{mj} \sim U(0, 1)

  with one random permutation :math:`\pi_j` for each column, and F the cdf of
  the component's row law (any law). Every coordinate has one row in each of M
  cells of probability 1/M, for any M and H. Each row has exactly the row law,
  so every component stays unbiased. Stratification removes the part of the
  variance that is a sum over coordinates: most of the variance of positive maps
  at small distances, little of that of trigonometric ones.

  References:
    McKay, Beckman and Conover, A Comparison of Three Methods for Selecting
    Values of Input Variables, 1979, section 2.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "lhs", num_features=6)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> (w > 0).sum(axis=0).tolist()
    [3, 3, 3, 3]
  """

  info = base.WeightMatrixInfo(
    name="lhs",
    group="unit cube",
    marginals="exact",
    source="McKay, Beckman and Conover 1979, section 2",
    summary="one row in each 1/M of every coordinate",
    good_for="positive maps at small distances; any row law, any M",
    row_laws=ENTRY_LAWS,
    cost="H sorts of M numbers",
    variance="trig 0.95 at scale 0.2, pos 0.28 at 0.1; H=32",
  )

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    draw_column = lambda rng: pieces.stratified_uniforms(rng, num_rows)
    column_rngs = jax.random.split(rng, head_dim)
    uniforms = jax.vmap(draw_column, out_axes=1)(column_rngs)
    return {"w": law.from_uniform(uniforms)}
