"""Orthogonal rows, with norms of every kind, alone or with their opposites."""

import dataclasses

import jax

from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
  draw_blocks,
)
from spectraformer_jax.weight_matrices.building_blocks import (
  antithetic_rows,
  check_norms,
  haar,
  row_norms,
)


def orthogonal_directions(rng: Array, num_rows: int, head_dim: int) -> Array:
  """Unit rows ``[M, H]``, orthogonal inside independent blocks of head_dim."""
  return draw_blocks(
    lambda rng, blocks: haar(rng, blocks, head_dim), rng, num_rows, head_dim
  )


def orthogonal_rows(
  rng: Array, norms: str, num_rows: int, head_dim: int
) -> Array:
  """`orthogonal_directions` with independent norms ``[M, H]``."""
  direction_rng, norm_rng = jax.random.split(rng)
  directions = orthogonal_directions(direction_rng, num_rows, head_dim)
  return row_norms(norm_rng, norms, num_rows, head_dim)[:, None] * directions


@WEIGHT_MATRICES.register("orf")
@dataclasses.dataclass(frozen=True)
class ORF(WeightMatrix):
  r"""Orthogonal random features: orthogonal rows inside blocks of head_dim.

  .. math::
    W = \mathrm{diag}(r)\, U, \quad U = (U_1; U_2; \ldots), \quad
    U_b \sim \mathrm{Haar}(H), \quad r_m \sim \chi_H

  Each row alone is N(0, I), so every component stays unbiased; orthogonality
  lowers the variance of trigonometric maps most (a factor of 0.38 at
  :math:`|x - y|^2 \approx 2.6`, H = 32; none once it is far above log M).

  Args:
    norms: "chi" (exact marginals) or "sqrt_d" (all norms sqrt(H): a bias that
      M does not reduce, for less variance; see "orf_sqrtd").

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

  norms: str = "chi"

  def __post_init__(self):
    check_norms(self.norms)

  @property
  def info(self):
    """Facts; name, marginals and variance depend on `norms`."""
    exact = self.norms == "chi"
    return WeightMatrixInfo(
      name="orf" if exact else "orf_sqrtd",
      group="geometric",
      marginals="exact" if exact else "approximate",
      source="Yu et al. 2016, equation 4",
      summary="orthogonal rows in blocks of head_dim"
      + ("" if exact else ", all of norm sqrt(head_dim)"),
      good_for="all components; the default"
      if exact
      else "attention, where less variance is worth a bias",
      cost="ceil(M/H) QR factorisations of H x H",
      variance="trig 0.38, pos 0.76 at scale 0.2, H=32"
      if exact
      else "trig 0.41, pos 0.38 at scale 0.2, H=32, M=128",
    )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    return {"w": orthogonal_rows(rng, self.norms, num_rows, head_dim)}


@WEIGHT_MATRICES.register("orf_sqrtd")
def orf_sqrtd() -> ORF:
  r"""Orthogonal rows that all have norm sqrt(H): `ORF` with norms="sqrt_d".

  Without the tail of :math:`|\omega|` positive maps have far less variance (a
  factor of 0.38 at scale 0.2, H = 32, M = 128), but the kernel is another one,
  whatever M is. With :math:`s = |x - y|^2, t = |x + y|^2`:

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


@WEIGHT_MATRICES.register("orf_antithetic")
@dataclasses.dataclass(frozen=True)
class ORFAntithetic(WeightMatrix):
  r"""Orthogonal rows, each beside its opposite: :math:`W = (B; -B)`.

  B is `ORF` with half of the rows (an odd M drops the last opposite). Rows sum
  to zero, which removes the first-order noise of positive maps: a factor of
  0.50 at scale 0.2, 0.08 at 0.1 (H = 32, M = 128). A cosine is even, so
  trigonometric maps only lose half of their rows.

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

  norms: str = "chi"

  def __post_init__(self):
    check_norms(self.norms)

  @property
  def info(self):
    """Facts; name, marginals and variance depend on `norms`."""
    exact = self.norms == "chi"
    return WeightMatrixInfo(
      name="orf_antithetic" if exact else "orf_sqrtd_anti",
      group="geometric",
      marginals="exact" if exact else "approximate",
      source="antithetic variates on Yu et al. 2016"
      if exact
      else "third-degree spherical-radial rule, randomly rotated",
      summary="orthogonal rows and their opposites"
      + ("" if exact else ", all of norm sqrt(head_dim)"),
      good_for="positive maps with one sign of a row; trigonometric and "
      "hyperbolic ones lose half of the rows",
      antithetic=True,
      constraint="any num_features (even preferred), any head_dim",
      cost="ceil(M/2H) QR factorisations of H x H",
      variance="trig 0.76, pos 0.50 at scale 0.2, H=32, M=128"
      if exact
      else "trig 0.76, pos 0.13 at scale 0.2, H=32, M=128",
    )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    half = orthogonal_rows(rng, self.norms, -(-num_rows // 2), head_dim)
    return {"w": antithetic_rows(half, num_rows)}


@WEIGHT_MATRICES.register("orf_sqrtd_anti")
def orf_sqrtd_anti() -> ORFAntithetic:
  r"""`ORFAntithetic` with norms="sqrt_d": lowest error of positive maps.

  With M = 2H it is the third-degree spherical-radial rule (the nodes of the
  cubature Kalman filter) under a random rotation; larger M stacks such rules.
  Kernel estimates of degree up to 3 in w are exact for every draw. The bias is
  that of "orf_sqrtd"; the PosRF error is 0.13 of the independent one at scale
  0.2, 0.01 at 0.1 (H = 32, M = 128), bias included.

  References:
    Arasaratnam and Haykin, Cubature Kalman Filters, 2009.

  Example:
    >>> orf_sqrtd_anti() == ORFAntithetic(norms="sqrt_d")
    True
  """
  return ORFAntithetic(norms="sqrt_d")
