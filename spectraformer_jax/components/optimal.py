"""Positive features with the variance-optimal quadratic term."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.components.data_dependent import DataDependent
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Mask,
  Params,
  PyTree,
  Side,
  WeightSample,
)


def optimal_rho(pair_square: float | Array, head_dim: int) -> float | Array:
  r"""Returns the variance-optimal :math:`\rho = 1/(1 - 8A)`, in (0, 1].

  Args:
    pair_square: S = mean over pairs of :math:`|x + y|^2`; a float, or an array
      of any shape.
    head_dim: H; 1 if S is that of a single coordinate.
  """
  d, s = float(head_dim), pair_square
  root = ((2.0 * s + d) ** 2 + 8.0 * d * s) ** 0.5
  return 2.0 * d / (root + 2.0 * s + d)


def constant_rho(head_dim: int) -> float:
  """Returns `optimal_rho` of unscaled queries and keys of unit variance."""
  # After scaling, |x|^2 and |y|^2 are sqrt(H) each.
  return float(optimal_rho(2.0 * math.sqrt(head_dim), head_dim))


def norm_terms(rho: Array, rows: Array) -> tuple[Array, Array]:
  """Returns the terms that A = diag((1 - 1/rho) / 8) adds to the exponent.

  Args:
    rho: scalar or ``[H]``.
    rows: ``[M, H]``.

  Returns:
    log det(I - 4A) / 4 + w . A w, ``[M]``, and the slope sqrt(1 - 4a) of
    each coordinate, ``[H]``.
  """
  inverse = 1.0 / jnp.broadcast_to(rho, rows.shape[-1:])
  one_minus_4a = (1.0 + inverse) / 2.0
  a = (1.0 - inverse) / 8.0
  quadratic = base.project(jnp.square(rows), a[None, :])[:, 0]
  log_scale = 0.25 * jnp.sum(jnp.log(one_minus_4a))
  return quadratic + log_scale, jnp.sqrt(one_minus_4a)


@dataclasses.dataclass(frozen=True)
class OptimalPositive(DataDependent):
  r"""Base of the positive components with a quadratic term in the rows.

  .. math::
    f(\omega, x) = \det(I - 4A)^{1/4} \exp(\omega^\top A \omega
      + \omega^\top (I - 4A)^{1/2} x' - |x'|^2/2)

  with A diagonal, :math:`1 - 8 a_l = 1/\rho_l`, and x' a linear map of x, one
  for queries and one for keys, such that :math:`x' \cdot y' = x \cdot y`.
  Parameters are "rho", a scalar or ``[H]``, and the maps of `pre_map`.
  """

  def pre_map(self, x: Array, side: Side, parameters: Params) -> Array:
    """Returns x', ``[..., H]``; by default x itself."""
    return x

  def product(self, x: Array, y: Array) -> Array:
    """Returns the part of x y^T that `solve` uses, for vectors ``[..., H]``."""
    raise NotImplementedError

  def mean_square(self, x: Array, mask: Mask) -> Array:
    """Returns the mean of `product(x, x)` over positions, x ``[T, H]``."""
    return base.masked_mean(self.product(x, x), mask)

  @override
  def moments(
    self, query: Array, key: Array, query_mask: Mask, key_mask: Mask
  ) -> PyTree:
    query_mean = base.masked_mean(query, query_mask)
    key_mean = base.masked_mean(key, key_mask)
    return {
      "query_square": self.mean_square(query, query_mask),
      "key_square": self.mean_square(key, key_mask),
      "query_mean": query_mean,
      "key_mean": key_mean,
      "cross": self.product(query_mean, key_mean),
    }

  @override
  def constant(self, head_dim: int) -> Params:
    """Needs no maps, because isotropic data gain nothing from any."""
    return {"rho": jnp.float32(constant_rho(head_dim))}

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    exponent, mapped = self._exponent(x, rows, side, state)
    shift = self.gaussian_shift(x) - base.half_square(mapped)
    return LogFeatures(exponent + shift)

  @override
  def query_features(
    self, x: Array, rows: WeightSample, state: ComponentState
  ) -> LogFeatures:
    return LogFeatures(self._exponent(x, rows, "query", state)[0])

  def _exponent(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> tuple[Array, Array]:
    """Returns the terms that depend on rows, ``[T, M]``, and x', ``[T, H]``."""
    parameters = self.parameters(state, x.shape[-1])
    mapped = self.pre_map(x, side, parameters)
    norm_term, slope = norm_terms(parameters["rho"], rows.w)
    projected = base.project(slope[None, :] * mapped, rows.w)
    return projected + norm_term[None, :], mapped

  @override
  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    parameters = self.parameters(state, x.shape[-1])
    x = self.pre_map(x, "query", parameters)
    y = self.pre_map(y, "key", parameters)
    rho = jnp.broadcast_to(parameters["rho"], x.shape[-1:])
    scale = jnp.sum(jnp.log((rho + 1.0) / 2.0) - 0.5 * jnp.log(rho))
    # (rho + 1)|x + y|^2 - |x|^2 - |y|^2, written without cancellation.
    pair_square = jnp.square(x + y)
    square = jnp.einsum("...h,h->...", pair_square, rho, precision="highest")
    return scale + square + 2.0 * jnp.sum(x * y, axis=-1)


@base.COMPONENTS.register("oprf")
@dataclasses.dataclass(frozen=True)
class OPRF(OptimalPositive):
  r"""Optimal positive random features (OPRF, FAVOR++).

  .. math::
    f(\omega, x) = (1 - 4A)^{H/4}
      \exp(A |\omega|^2 + \sqrt{1 - 4A}\, \omega^\top x - |x|^2/2)

  with the A that minimises the mean log second moment over all pairs of one
  head: :math:`A = (1 - 1/\rho)/8 \le 0`, where
  :math:`\rho = 2H / (\sqrt{(2S + H)^2 + 8HS} + 2S + H)` and
  :math:`S = \mathrm{mean} |x_i + y_j|^2`. A = 0 gives PosRF. Because A is
  negative every feature is bounded. The Gaussian kernel subtracts another
  :math:`|x|^2/2` in the exponent.

  The second moment of one row is :math:`(1-4A)^H (1-8A)^{-H/2}
  \exp(2(1-4A)/(1-8A) |x+y|^2 - |x|^2 - |y|^2)`.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of S: "batch", "ema", "learned" or "constant".

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

  info = base.ComponentInfo(
    name="oprf",
    family="exponential",
    estimates="softmax or Gaussian kernel",
    formula="(1-4A)^(H/4) exp(A|w|^2 + sqrt(1-4A) w.x - |x|^2/2)",
    positive=True,
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

  @override
  def product(self, x: Array, y: Array) -> Array:
    return jnp.sum(x * y, axis=-1)

  @override
  def solve(self, moments: PyTree) -> PyTree:
    pair_square = (
      moments["query_square"] + moments["key_square"] + 2.0 * moments["cross"]
    )
    # Rounding must not push a mean of squares below zero.
    pair_square = jnp.maximum(pair_square, 0.0)
    return {"rho": optimal_rho(pair_square, moments["query_mean"].shape[-1])}

  @override
  def init_params(self, head_dim: int) -> Params:
    return {"rho_logit": logit(self.constant(head_dim)["rho"])}

  @override
  def from_params(self, params: Params) -> Params:
    return {"rho": jax.nn.sigmoid(params["rho_logit"])}


@base.COMPONENTS.register("oprf_hyp")
@dataclasses.dataclass(frozen=True)
class OPRFHyperbolic(OPRF):
  r"""OPRF with both signs of every row.

  .. math::
    f(\omega, x) = 2^{-1/2} (1 - 4A)^{H/4} e^{A |\omega|^2 - |x|^2/2}
      [e^{\sqrt{1 - 4A}\, \omega^\top x}, e^{-\sqrt{1 - 4A}\, \omega^\top x}]

  with the A of :class:`OPRF`. The second moment of one row is the mean of
  OPRF's and of :math:`(1-4A)^H (1-8A)^{-H/2} e^{-|x|^2 - |y|^2}`: about half of
  OPRF's variance for one more exponential, from the same projection. The
  Gaussian kernel subtracts another :math:`|x|^2/2` in the exponent.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of S: "batch", "ema", "learned" or "constant".

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, Theorem 3.3, and
    Choromanski et al., Rethinking Attention with Performers, 2021, Lemma 1
    (2205.15317, 2009.14794); neither has the combination.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("oprf_hyp", "orf", num_features=16,
    ...                     component_kwargs={"statistics": "constant"})
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 32)
  """

  features_per_row = 2
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

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    both = self.query_features(x, rows, state).log_magnitude
    return LogFeatures(both - base.half_square(x) + self.gaussian_shift(x))

  @override
  def query_features(
    self, x: Array, rows: WeightSample, state: ComponentState
  ) -> LogFeatures:
    rho = self.parameters(state, x.shape[-1])["rho"]
    norm_term, slope = norm_terms(rho, rows.w)
    projected = base.project(slope[None, :] * x, rows.w)
    norm_term = (norm_term - 0.5 * math.log(2.0))[None, :]
    both = [norm_term + projected, norm_term - projected]
    return LogFeatures(jnp.concatenate(both, axis=-1))

  @override
  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    both_signs_agree = super().softmax_log_second_moment(x, y, state)
    rho = self.parameters(state, x.shape[-1])["rho"]
    square = jnp.sum(jnp.square(x + y), axis=-1)
    both_signs_differ = both_signs_agree - (rho + 1.0) * square
    return jnp.logaddexp(both_signs_agree, both_signs_differ) - math.log(2.0)


def logit(probability: Array) -> Array:
  """Returns the inverse of the sigmoid."""
  return jnp.log(probability) - jnp.log1p(-probability)
