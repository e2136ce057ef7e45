"""Rows spread evenly: moment matching."""

import dataclasses

import jax
import jax.numpy as jnp

from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)


@WEIGHT_MATRICES.register("mm")
@dataclasses.dataclass(frozen=True)
class MM(WeightMatrix):
  r"""Moment matching: rows with mean exactly 0 and covariance exactly I.

  .. math::
    W = \sqrt{M}\, Q, \quad G - \bar G = Q R, \quad G_{mj} \sim N(0, 1)

  (Q of the reduced QR factorisation with positive diagonal: the same law as
  whitening by any root of the sample covariance, and better conditioned.)
  Low variance for both trigonometric and positive maps once M >= 2 H. The bias
  falls like 1/M: the trigonometric estimate is
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

  info = WeightMatrixInfo(
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

  def check(self, num_rows, head_dim):
    """See `WeightMatrix.check`."""
    if num_rows <= head_dim:
      raise ValueError(
        "weight matrix 'mm' needs num_features > head_dim, got "
        f"num_features={num_rows} and head_dim={head_dim}: use at least "
        f"{head_dim + 1} features, or 'orf'."
      )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    gaussian = jax.random.normal(rng, (num_rows, head_dim))
    centred = gaussian - jnp.mean(gaussian, axis=0, keepdims=True)
    with jax.default_matmul_precision("highest"):
      q, r = jnp.linalg.qr(centred)
    signs = jnp.where(jnp.diagonal(r) < 0.0, -1.0, 1.0)
    return {"w": jnp.sqrt(float(num_rows)) * q * signs[None, :]}
