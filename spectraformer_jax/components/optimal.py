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
from spectraformer_jax.typing import Array, LogFeatures, PyTree, Side


def optimal_rho(pair_square, head_dim: int):
  r"""The variance-optimal :math:`\rho` for mean :math:`|x + y|^2`.

  With :math:`1 - 8A = 1/\rho`; written without cancellation, in (0, 1].

  Args:
    pair_square: S = mean over pairs of :math:`|x + y|^2`; a float, or an array
      of any shape.
    head_dim: H; 1 where S is that of a single coordinate.
  """
  d, s = float(head_dim), pair_square
  root = ((2.0 * s + d) ** 2 + 8.0 * d * s) ** 0.5
  return 2.0 * d / (root + 2.0 * s + d)


def constant_rho(head_dim: int) -> float:
  """`optimal_rho` where unscaled queries and keys have unit variance."""
  # Scaled, |x|^2 and |y|^2 are sqrt(H) each.
  return optimal_rho(2.0 * math.sqrt(head_dim), head_dim)


def norm_terms(rho: Array, rows: Array) -> tuple[Array, Array]:
  """What A = diag((1 - 1/rho) / 8) adds to the exponent of PosRF.

  Args:
    rho: scalar or ``[H]``.
    rows: ``[M, H]``.

  Returns:
    log det(I - 4A) / 4 + w . A w, ``[M]``, and the slope sqrt(1 - 4a) of
    each coordinate, ``[H]``.
  """
  inverse = 1.0 / jnp.broadcast_to(rho, rows.shape[-1:])
  one_minus_4a = (1.0 + inverse) / 2.0
  quadratic = project(jnp.square(rows), (1.0 - inverse)[None, :] / 8.0)[:, 0]
  log_scale = 0.25 * jnp.sum(jnp.log(one_minus_4a))
  return quadratic + log_scale, jnp.sqrt(one_minus_4a)


@dataclasses.dataclass(frozen=True)
class OptimalPositive(DataDependent):
  r"""Base of the positive components whose rows are weighed by norm.

  .. math::
    f(\omega, x) = \det(I - 4A)^{1/4} \exp(\omega^\top A \omega
      + \omega^\top (I - 4A)^{1/2} x' - |x'|^2/2)

  with A diagonal, :math:`1 - 8 a_l = 1/\rho_l`, and x' a linear image of x, one
  for queries and one for keys, such that :math:`x' \cdot y' = x \cdot y`.
  Parameters hold "rho", a scalar or ``[H]``, and what `pre_map` needs.
  """

  def pre_map(self, x: Array, side: Side, parameters: PyTree) -> Array:
    """x', ``[..., H]``: here x itself."""
    del side, parameters
    return x

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    exponent, mapped = self._exponent(x, rows, side, state)
    shift = self.gaussian_shift(x) - half_square(mapped)
    return LogFeatures(exponent + shift)

  def query_features(self, x, rows, state):
    """See `Component.query_features`."""
    return LogFeatures(self._exponent(x, rows, "query", state)[0])

  def _exponent(self, x, rows, side, state) -> tuple[Array, Array]:
    """What depends on rows ``[T, M]``, and x' ``[T, H]``."""
    parameters = self.parameters(state, x.shape[-1])
    mapped = self.pre_map(x, side, parameters)
    norm_term, slope = norm_terms(parameters["rho"], rows.w)
    exponent = project(slope[None, :] * mapped, rows.w) + norm_term[None, :]
    return exponent, mapped

  def softmax_log_second_moment(self, x, y, state):
    """See `KernelComponent.softmax_log_second_moment`."""
    parameters = self.parameters(state, x.shape[-1])
    x = self.pre_map(x, "query", parameters)
    y = self.pre_map(y, "key", parameters)
    rho = jnp.broadcast_to(parameters["rho"], x.shape[-1:])
    scale = jnp.sum(jnp.log((rho + 1.0) / 2.0) - 0.5 * jnp.log(rho))
    # (rho + 1)|x + y|^2 - |x|^2 - |y|^2, without the terms that cancel.
    square = jnp.einsum(
      "...h,h->...", jnp.square(x + y), rho, precision="highest"
    )
    return scale + square + 2.0 * jnp.sum(x * y, axis=-1)


@COMPONENTS.register("oprf")
@dataclasses.dataclass(frozen=True)
class OPRF(OptimalPositive):
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
    good_for="the default: bounded features, positive; least variance with one "
    "A and one exponential a row. Isotropic data: oprf_hyp has half of it; "
    "unequal axes: asderf",
    avoid="causal attention with statistics='batch'",
    source="2205.15317, Theorem 3.3",
  )

  def init(self, rng, head_dim):
    """See `Component.init`: logit of rho if learned."""
    del rng
    if self.statistics != "learned":
      return {}
    return {"rho_logit": logit(self.constant(head_dim)["rho"])}

  def moments(self, query, key, query_mask, key_mask):
    """See `Component.moments`; "cross" is the product of the means."""
    query_mean = masked_mean(query, query_mask)
    key_mean = masked_mean(key, key_mask)
    return {
      "query_square": masked_mean(jnp.sum(query**2, -1), query_mask),
      "key_square": masked_mean(jnp.sum(key**2, -1), key_mask),
      "query_mean": query_mean,
      "key_mean": key_mean,
      "cross": jnp.sum(query_mean * key_mean, axis=-1),
    }

  def solve(self, moments):
    """See `Component.solve`."""
    pair_square = (
      moments["query_square"] + moments["key_square"] + 2.0 * moments["cross"]
    )
    # Rounding must not push a mean of squares below zero.
    pair_square = jnp.maximum(pair_square, 0.0)
    return {"rho": optimal_rho(pair_square, moments["query_mean"].shape[-1])}

  def constant(self, head_dim):
    """See `DataDependent.constant`."""
    return {"rho": jnp.float32(constant_rho(head_dim))}

  def from_params(self, params):
    """See `DataDependent.from_params`."""
    return {"rho": jax.nn.sigmoid(params["rho_logit"])}


@COMPONENTS.register("oprf_hyp")
@dataclasses.dataclass(frozen=True)
class OPRFHyperbolic(OPRF):
  r"""OPRF with both signs of every row.

  .. math::
    f(\omega, x) = 2^{-1/2} (1 - 4A)^{H/4} e^{A |\omega|^2 - |x|^2/2}
      [e^{\sqrt{1 - 4A}\, \omega^\top x}, e^{-\sqrt{1 - 4A}\, \omega^\top x}]

  with the A of :class:`OPRF`. The second moment of one row is the mean of
  OPRF's and of :math:`(1-4A)^H (1-8A)^{-H/2} e^{-|x|^2 - |y|^2}`: about half of
  OPRF's variance for one more exponential, from the same projection. The
  Gaussian kernel takes another :math:`|x|^2/2` off the exponent.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where S comes from: "batch", "ema", "learned", "constant".

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, Theorem 3.3, and
    Choromanski et al., Rethinking Attention with Performers, 2021, Lemma 1
    (2205.15317, 2009.14794); the combination is of neither.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("oprf_hyp", "orf", num_features=16,
    ...                     component_kwargs={"statistics": "constant"})
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 32)
  """

  info = dataclasses.replace(
    OPRF.info,
    name="oprf_hyp",
    formula=(
      "(1-4A)^(H/4) exp(A|w|^2 - |x|^2/2) [exp(sqrt(1-4A) w.x), "
      "exp(-sqrt(1-4A) w.x)] / sqrt 2"
    ),
    features="2M",
    variance=(
      "(1-4A)^H (1-8A)^(-H/2) exp(-|x|^2 - |y|^2) "
      "(exp(2(1-4A)/(1-8A)|x+y|^2) + 1) / 2K^2 - 1"
    ),
    good_for="half the variance of oprf from the same rows; the least at equal "
    "F on small isotropic data",
    avoid="causal attention with statistics='batch'; antithetic matrices",
    source="2205.15317, Theorem 3.3, with 2009.14794, Lemma 1",
    even=True,
  )

  def feature_dim(self, num_features, head_dim):
    """See `Component.feature_dim`."""
    del head_dim
    return 2 * num_features

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    del side
    both = self.query_features(x, rows, state).log_magnitude
    return LogFeatures(both - half_square(x) + self.gaussian_shift(x))

  def query_features(self, x, rows, state):
    """See `Component.query_features`."""
    rho = self.parameters(state, x.shape[-1])["rho"]
    norm_term, slope = norm_terms(rho, rows.w)
    projected = project(slope[None, :] * x, rows.w)
    norm_term -= 0.5 * math.log(2.0)
    return LogFeatures(
      jnp.concatenate(
        [norm_term[None, :] + projected, norm_term[None, :] - projected],
        axis=-1,
      )
    )

  def softmax_log_second_moment(self, x, y, state):
    """See `KernelComponent.softmax_log_second_moment`."""
    both_signs_agree = super().softmax_log_second_moment(x, y, state)
    rho = self.parameters(state, x.shape[-1])["rho"]
    square = jnp.sum(jnp.square(x + y), axis=-1)
    both_signs_differ = both_signs_agree - (rho + 1.0) * square
    return jnp.logaddexp(both_signs_agree, both_signs_differ) - math.log(2.0)


def logit(probability: Array) -> Array:
  """The inverse of the sigmoid."""
  return jnp.log(probability) - jnp.log1p(-probability)
