"""Positive features with the variance-optimal quadratic term."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from spectraformer_jax.components.base import (
  COMPONENTS,
  ComponentInfo,
  half_square,
  masked_mean,
  project,
)
from spectraformer_jax.components.data_dependent import DataDependent
from spectraformer_jax.typing import Array, LogFeatures


def optimal_rho(pair_square: Array, head_dim: int) -> Array:
  r"""The variance-optimal :math:`\rho` for mean :math:`|x + y|^2`.

  With :math:`1 - 8A = 1/\rho`; written without cancellation, in (0, 1].

  Args:
    pair_square: S = mean over pairs of :math:`|x + y|^2`, any shape.
    head_dim: H.
  """
  d, s = float(head_dim), pair_square
  root = jnp.sqrt(jnp.square(2.0 * s + d) + 8.0 * d * s)
  return 2.0 * d / (root + 2.0 * s + d)


@COMPONENTS.register("oprf")
@dataclasses.dataclass(frozen=True)
class OPRF(DataDependent):
  r"""Optimal positive random features (OPRF, FAVOR++).

  .. math::
    f(\omega, x) = (1 - 4A)^{H/4}
      \exp(A |\omega|^2 + \sqrt{1 - 4A}\, \omega^\top x - |x|^2/2)

  with the A that minimises the mean log second moment over all pairs of the
  head: :math:`A = (1 - 1/\rho)/8 \le 0`, where
  :math:`\rho = 2H / (\sqrt{(2S + H)^2 + 8HS} + 2S + H)` and
  :math:`S = \mathrm{mean} |x_i + y_j|^2`. A = 0 gives PosRF. Because A is
  negative every feature is bounded. The Gaussian kernel takes another
  :math:`|x|^2/2` off the exponent.

  The second moment of one row is :math:`(1-4A)^H (1-8A)^{-H/2}
  \exp(2(1-4A)/(1-8A) |x+y|^2 - |x|^2 - |y|^2)`.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where S comes from: "batch", "ema", "learned", "constant".

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, Theorem 3.3 (2205.15317);
    S over all pairs instead of the paper's averages.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("oprf", "orf", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jnp.ones((1, 3, 1, 4)) / 2
    >>> stats = fm.calibrate(v, x, x)
    >>> fm.apply(v, x, side="key", stats=stats).shape
    (1, 3, 1, 16)
  """

  info = ComponentInfo(
    name="oprf",
    family="exponential",
    estimates="softmax or Gaussian kernel",
    formula="(1-4A)^(H/4) exp(A|w|^2 + sqrt(1-4A) w.x - |x|^2/2)",
    positive=True,
    features="M",
    variance=(
      "(1-4A)^H (1-8A)^(-H/2) exp(2(1-4A)/(1-8A)|x+y|^2 - |x|^2 - |y|^2)"
      " / K^2 - 1"
    ),
    good_for="the default: bounded features, least variance per feature",
    avoid="causal attention with statistics='batch'",
    source="2205.15317, Theorem 3.3",
  )

  def init(self, rng, head_dim):
    """See `Component.init`: logit of rho if learned."""
    del rng
    if self.statistics != "learned":
      return {}
    rho = self.constant(head_dim)["rho"]
    return {"rho_logit": jnp.log(rho) - jnp.log1p(-rho)}

  def moments(self, query, key, query_mask, key_mask):
    """See `Component.moments`."""
    return {
      "query_square": masked_mean(jnp.sum(query**2, -1), query_mask),
      "key_square": masked_mean(jnp.sum(key**2, -1), key_mask),
      "query_mean": masked_mean(query, query_mask),
      "key_mean": masked_mean(key, key_mask),
    }

  def solve(self, moments):
    """See `Component.solve`."""
    query_mean, key_mean = moments["query_mean"], moments["key_mean"]
    pair_square = (
      moments["query_square"]
      + moments["key_square"]
      + 2.0 * jnp.sum(query_mean * key_mean, axis=-1)
    )
    # Rounding must not push a mean of squares below zero.
    pair_square = jnp.maximum(pair_square, 0.0)
    return {"rho": optimal_rho(pair_square, query_mean.shape[-1])}

  def constant(self, head_dim):
    """See `DataDependent.constant`: |x|^2 and |y|^2 are sqrt(H) each."""
    pair_square = jnp.float32(2.0 * math.sqrt(head_dim))
    return {"rho": optimal_rho(pair_square, head_dim)}

  def from_params(self, params):
    """See `DataDependent.from_params`."""
    return {"rho": jax.nn.sigmoid(params["rho_logit"])}

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    del side
    head_dim = x.shape[-1]
    inverse_rho = 1.0 / self.parameters(state, head_dim)["rho"]
    a = (1.0 - inverse_rho) / 8.0
    one_minus_4a = (1.0 + inverse_rho) / 2.0
    row_term = a * jnp.sum(jnp.square(rows.w), axis=-1)[None, :]
    log_scale = head_dim / 4.0 * jnp.log(one_minus_4a)
    exponent = jnp.sqrt(one_minus_4a) * project(x, rows.w) - half_square(x)
    return LogFeatures(log_scale + row_term + exponent + self.gaussian_shift(x))
