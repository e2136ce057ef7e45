"""Orthogonal rows with independent, equal or coupled norms; negated rows."""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices import base, pieces
from spectraformer_jax.weight_matrices.row_laws import open_uniform


def orthogonal_directions(rng: Array, num_rows: int, head_dim: int) -> Array:
  """Draws unit rows ``[M, H]``: independent blocks of orthogonal rows."""
  draw_block = lambda rng, num_blocks: pieces.haar(rng, num_blocks, head_dim)
  return base.draw_blocks(draw_block, rng, num_rows, head_dim)


def orthogonal_rows(
  rng: Array, norms: str, num_rows: int, head_dim: int
) -> Array:
  """Draws `orthogonal_directions`, scaled to drawn `row_norms`: ``[M, H]``."""
  direction_rng, norm_rng = jax.random.split(rng)
  directions = orthogonal_directions(direction_rng, num_rows, head_dim)
  lengths = pieces.row_norms(norm_rng, norms, num_rows, head_dim)
  return lengths[:, None] * directions


@base.WEIGHT_MATRICES.register("orf")
@dataclasses.dataclass(frozen=True)
class ORF(base.NormedRows):
  r"""Orthogonal random features: orthogonal rows in blocks of head_dim.

  .. math::
    W = \mathrm{diag}(r)\, U, \quad U = (U_1; U_2; \ldots), \quad
    U_b \sim \mathrm{Haar}(H), \quad r_m \sim \chi_H

  Each row alone is N(0, I), so every component stays unbiased. Orthogonality
  lowers the variance of trigonometric maps most: to 0.38 of that of independent
  rows at :math:`|x - y|^2 \approx 2.6`, H = 32, but not at all once
  :math:`|x - y|^2` is far above log M.

  Args:
    norms: "chi" (exact marginals), or "sqrt_d" (all norms are sqrt(H): less
      variance, and a bias that M does not reduce; see "orf_sqrtd").

  Raises:
    ValueError: unknown `norms`.

  References:
    Yu et al., Orthogonal Random Features, 2016, equation 4 (1610.09072).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=8).projection["rows"]["w"][0]
    >>> bool(abs(w[0] @ w[1]) < 1e-4)
    True
  """

  facts = base.WeightMatrixInfo(
    name="orf",
    group="geometric",
    marginals="exact",
    source="Yu et al. 2016, equation 4",
    summary="orthogonal rows in blocks of head_dim",
    good_for="all components; the default",
    cost="ceil(M/H) QR factorisations of H x H",
    variance="trig 0.38, pos 0.76 at scale 0.2, H=32",
  )

  def _info(self) -> base.WeightMatrixInfo:
    if self.norms == "chi":
      return self.facts
    return dataclasses.replace(
      super()._info(),
      name="orf_sqrtd",
      summary=f"{self.facts.summary}, all of norm sqrt(head_dim)",
      good_for="attention, where less variance is worth a bias",
      variance="trig 0.41, pos 0.38 at scale 0.2, H=32, M=128",
    )

  info = base.info_from_options(_info)

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    return orthogonal_rows(rng, self.norms, num_rows, head_dim)


@base.WEIGHT_MATRICES.register("orf_sqrtd")
def orf_sqrtd() -> ORF:
  r"""Orthogonal rows that all have norm sqrt(H): `ORF` with norms="sqrt_d".

  No row is long, so positive maps have far less variance (0.38 of that of
  independent rows at scale 0.2, H = 32, M = 128), but for any M they estimate
  another kernel. With :math:`s = |x - y|^2, t = |x + y|^2` the mean of a
  trigonometric estimate (first) and of a positive one (second) is:

  .. math::
    E\, \hat k = {}_0F_1(; H/2; -H s/4) \approx e^{-s/2} (1 - s^2/4H)
    \quad \text{(Gaussian)}, \qquad
    e^{-(|x|^2 + |y|^2)/2}\, {}_0F_1(; H/2; H t/4)
    \approx e^{x \cdot y} (1 - t^2/4H) \quad \text{(softmax)}

  References:
    Choromanski et al., Rethinking Attention with Performers, 2021 (2009.14794);
    mean: Demni and Kadri, 2023 (2310.07370).

  Example:
    >>> orf_sqrtd() == ORF(norms="sqrt_d"), orf_sqrtd().info.name
    (True, 'orf_sqrtd')
  """
  return ORF(norms="sqrt_d")


@base.WEIGHT_MATRICES.register("orf_antithetic")
@dataclasses.dataclass(frozen=True)
class ORFAntithetic(ORF):
  r"""Orthogonal rows and their negatives: :math:`W = (B; -B)`.

  B is `ORF` with half of the rows (if M is odd, the negative of the last row is
  left out). Rows sum to zero, which removes the part of the noise of positive
  maps that is linear in the rows: their variance is 0.50 of that of independent
  rows at scale 0.2, 0.08 at 0.1 (H = 32, M = 128). A cosine is even, so
  trigonometric maps gain nothing and lose half of their rows.

  Args:
    norms: "chi" (exact marginals) or "sqrt_d" (see "orf_sqrtd_anti").

  Raises:
    ValueError: unknown `norms`.

  References:
    Antithetic variates on Yu et al., Orthogonal Random Features, 2016.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf_antithetic", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> bool((w[:4] == -w[4:]).all())
    True
  """

  facts = dataclasses.replace(
    ORF.facts,
    name="orf_antithetic",
    source="antithetic variates on Yu et al. 2016",
    summary="orthogonal rows and their negatives",
    good_for="positive maps with one sign of a row; trigonometric and "
    "hyperbolic ones lose half of the rows",
    antithetic=True,
    constraint="any num_features (even preferred), any head_dim",
    cost="ceil(M/2H) QR factorisations of H x H",
    variance="trig 0.76, pos 0.50 at scale 0.2, H=32, M=128",
  )

  def _info(self) -> base.WeightMatrixInfo:
    if self.norms == "chi":
      return self.facts
    return dataclasses.replace(
      super()._info(),
      name="orf_sqrtd_anti",
      good_for=self.facts.good_for,
      source="third-degree spherical-radial rule, randomly rotated",
      summary=f"{self.facts.summary}, all of norm sqrt(head_dim)",
      variance="trig 0.76, pos 0.13 at scale 0.2, H=32, M=128",
    )

  info = base.info_from_options(_info)

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    half = super().draw_rows(rng, -(-num_rows // 2), head_dim)
    return pieces.antithetic_rows(half, num_rows)


@base.WEIGHT_MATRICES.register("orf_sqrtd_anti")
def orf_sqrtd_anti() -> ORFAntithetic:
  r"""`ORFAntithetic` with norms="sqrt_d": the lowest error of positive maps.

  With M = 2H it is the third-degree spherical-radial rule (the nodes of the
  cubature Kalman filter) under a random rotation; larger M stack such rules.
  Means over the rows of a polynomial of degree up to 3 are then exact for every
  draw. The bias is that of "orf_sqrtd". The mean squared error of PosRF, bias
  included, is 0.13 of that of independent rows at scale 0.2 and 0.01 of it at
  scale 0.1 (H = 32, M = 128).

  References:
    Arasaratnam and Haykin, Cubature Kalman Filters, 2009.

  Example:
    >>> orf_sqrtd_anti() == ORFAntithetic(norms="sqrt_d")
    True
  """
  return ORFAntithetic(norms="sqrt_d")


@base.WEIGHT_MATRICES.register("orf_pnc")
@dataclasses.dataclass(frozen=True)
class ORFPairedNorms(base.GaussianRows):
  r"""Pairwise norm coupling: each long row is paired with a short one.

  .. math::
    W = \mathrm{diag}(r)\, U, \quad r_{2k} = F^{-1}(u_k), \quad
    r_{2k+1} = F^{-1}(1 - u_k), \quad u_k \sim U(0, 1)

  U is as in `ORF`; F is the cdf of the chi law with H degrees of freedom. The
  rows of a pair are in the same block of H rows; if H is odd, the last row of a
  block has no partner and an independent norm. Each row alone is N(0, I). For
  two orthogonal rows this decreasing coupling of the norms is optimal. The
  trigonometric variance falls to 0.060 of that of independent rows at scale
  0.1, H = 32 (0.089 for `ORF`); positive maps gain nothing over `ORF`.

  References:
    Reid et al., Variance-Reducing Couplings for Random Features, 2024
    (2405.16541).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "orf_pnc", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> bool(abs(w[0] @ w[1]) < 1e-4)
    True
  """

  info = base.WeightMatrixInfo(
    name="orf_pnc",
    group="geometric",
    marginals="exact",
    source="Reid et al. 2024 (2405.16541)",
    summary="orthogonal rows, norms coupled in pairs: one long, one short",
    good_for="trigonometric maps",
    cost="ceil(M/H) QR factorisations of H x H, M quantiles",
    variance="trig 0.36 at scale 0.2, 0.06 at 0.1; pos as orf; H=32",
  )

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    direction_rng, norm_rng = jax.random.split(rng)
    num_blocks, num_pairs = -(-num_rows // head_dim), -(-head_dim // 2)
    u = open_uniform(norm_rng, (num_blocks, num_pairs))
    u = jnp.stack([u, 1.0 - u], axis=-1)
    u = jnp.reshape(u, (num_blocks, 2 * num_pairs))[:, :head_dim]
    norms = pieces.chi_ppf(jnp.reshape(u, (-1,))[:num_rows], head_dim)
    directions = orthogonal_directions(direction_rng, num_rows, head_dim)
    return norms[:, None] * directions


@base.WEIGHT_MATRICES.register("orf_strat")
@dataclasses.dataclass(frozen=True)
class ORFStratifiedNorms(base.GaussianRows):
  r"""Orthogonal rows with stratified norms: one in each quantile cell.

  .. math::
    W = \mathrm{diag}(r)\, U, \quad r_m = F^{-1}((\pi(m) + u_m) / M), \quad
    u_m \sim U(0, 1)

  U is as in `ORF`; F is the cdf of the chi law with H degrees of freedom;
  :math:`\pi` is a random permutation of 0 .. M - 1. Each row alone is N(0, I).
  It is as accurate as "orf_pnc" and needs no pairs.

  References:
    Stratified sampling (McKay, Beckman and Conover, 1979) of the norms of Yu et
    al., Orthogonal Random Features, 2016.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "orf_strat", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> bool(abs(w[0] @ w[1]) < 1e-4)
    True
  """

  info = dataclasses.replace(
    ORFPairedNorms.info,
    name="orf_strat",
    source="stratified norms on Yu et al. 2016",
    summary="orthogonal rows, one norm per quantile cell",
  )

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    return orthogonal_rows(rng, "stratified", num_rows, head_dim)
