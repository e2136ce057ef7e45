"""Positive features: exponentials of W x."""

import dataclasses
import math

import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Side,
  WeightSample,
)


@base.COMPONENTS.register("posrf")
@dataclasses.dataclass(frozen=True)
class PosRF(base.KernelComponent):
  r"""Positive random features (PosRF, FAVOR+).

  .. math::
    f(\omega, x) = \exp(\omega^\top x - |x|^2 / 2) \text{ (softmax)},
    \quad \exp(\omega^\top x - |x|^2) \text{ (gaussian)}

  One row has relative variance :math:`e^{|x + y|^2} - 1`: exact at y = -x,
  exponential in :math:`|x + y|^2`.

  Args:
    kernel: "softmax" or "gaussian".

  Raises:
    ValueError: unknown kernel.

  References:
    Choromanski et al., Rethinking Attention with Performers, 2021, Lemma 1
    (2009.14794).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> bool((fm.apply(v, jnp.ones((3, 1, 4)), side="key") > 0).all())
    True
  """

  info = base.ComponentInfo(
    name="posrf",
    family="exponential",
    estimates="softmax or Gaussian kernel",
    formula="exp(w.x - |x|^2/2)",
    positive=True,
    variance="exp|x+y|^2 - 1",
    good_for="stable attention without statistics, causal or not",
    avoid="large norms: oprf has far less variance at the same cost",
    source="2009.14794, Lemma 1",
  )

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    exponent = self.query_features(x, rows, state).log_magnitude
    return LogFeatures(exponent - base.half_square(x) + self.gaussian_shift(x))

  @override
  def query_features(
    self, x: Array, rows: WeightSample, state: ComponentState
  ) -> LogFeatures:
    return LogFeatures(base.project(x, rows.w))

  @override
  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    square = jnp.sum(jnp.square(x + y), axis=-1)
    return 2.0 * jnp.sum(x * y, axis=-1) + square


@base.COMPONENTS.register("posrf_hyp")
@dataclasses.dataclass(frozen=True)
class PosRFHyperbolic(base.KernelComponent):
  r"""Positive features with both signs of every row (hyperbolic FAVOR+).

  .. math::
    f(\omega, x) = 2^{-1/2} e^{-|x|^2 / 2}
      [e^{\omega^\top x}, e^{-\omega^\top x}]

  (softmax; the Gaussian kernel subtracts another :math:`|x|^2/2` in the
  exponent). One row has relative variance :math:`\cosh|x + y|^2 - 1`, which is
  :math:`(1 - e^{-|x+y|^2})/2` times that of PosRF: less than half for twice
  the features, so the variance is lower at equal feature dimension, too.

  Args:
    kernel: "softmax" or "gaussian".

  Raises:
    ValueError: unknown kernel.

  References:
    Choromanski et al., Rethinking Attention with Performers, 2021, Lemma 1
    (2009.14794).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf_hyp", "orf", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 32)
  """

  features_per_row = 2
  info = base.ComponentInfo(
    name="posrf_hyp",
    family="exponential",
    estimates="softmax or Gaussian kernel",
    formula="exp(-|x|^2/2) [exp(w.x), exp(-w.x)] / sqrt 2",
    positive=True,
    features="2M",
    variance="cosh|x+y|^2 - 1",
    good_for="posrf with less variance for one more exponential per row",
    avoid="large norms: oprf_hyp has far less variance; antithetic matrices",
    source="2009.14794, Lemma 1",
    even=True,
  )

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    both = self.query_features(x, rows, state).log_magnitude
    shift = self.gaussian_shift(x) - base.half_square(x) - 0.5 * math.log(2.0)
    return LogFeatures(both + shift)

  @override
  def query_features(
    self, x: Array, rows: WeightSample, state: ComponentState
  ) -> LogFeatures:
    projected = base.project(x, rows.w)
    return LogFeatures(jnp.concatenate([projected, -projected], axis=-1))

  @override
  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    square = jnp.sum(jnp.square(x + y), axis=-1)
    return 2.0 * jnp.sum(x * y, axis=-1) + base.log_cosh(square)
