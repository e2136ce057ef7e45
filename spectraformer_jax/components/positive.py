"""Positive features: exponentials of W x."""

import dataclasses
import math

import jax.numpy as jnp

from spectraformer_jax.components.base import (
  COMPONENTS,
  ComponentInfo,
  KernelComponent,
  half_square,
  log_cosh,
  project,
)
from spectraformer_jax.typing import LogFeatures


@COMPONENTS.register("posrf")
@dataclasses.dataclass(frozen=True)
class PosRF(KernelComponent):
  r"""Positive random features (PosRF, FAVOR+).

  .. math::
    f(\omega, x) = \exp(\omega^\top x - |x|^2 / 2) \text{ (softmax)},
    \quad \exp(\omega^\top x - |x|^2) \text{ (gaussian)}

  One row has relative variance :math:`e^{|x + y|^2} - 1`: exact at y = -x,
  exponential in the size of x + y.

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

  info = ComponentInfo(
    name="posrf",
    family="exponential",
    estimates="softmax or Gaussian kernel",
    formula="exp(w.x - |x|^2/2)",
    positive=True,
    features="M",
    variance="exp|x+y|^2 - 1",
    good_for="stable attention without statistics, causal or not",
    avoid="large norms: oprf has far less variance at the same cost",
    source="2009.14794, Lemma 1",
  )

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    del side
    exponent = self.query_features(x, rows, state).log_magnitude
    return LogFeatures(exponent - half_square(x) + self.gaussian_shift(x))

  def query_features(self, x, rows, state):
    """See `Component.query_features`."""
    del state
    return LogFeatures(project(x, rows.w))

  def softmax_log_second_moment(self, x, y, state):
    """See `KernelComponent.softmax_log_second_moment`."""
    del state
    square = jnp.sum(jnp.square(x + y), axis=-1)
    return 2.0 * jnp.sum(x * y, axis=-1) + square


@COMPONENTS.register("posrf_hyp")
@dataclasses.dataclass(frozen=True)
class PosRFHyperbolic(KernelComponent):
  r"""Positive features with both signs of every row (hyperbolic FAVOR+).

  .. math::
    f(\omega, x) = 2^{-1/2} e^{-|x|^2 / 2}
      [e^{\omega^\top x}, e^{-\omega^\top x}]

  (softmax; the Gaussian kernel takes another :math:`|x|^2/2` off the
  exponent). One row has relative variance :math:`\cosh|x + y|^2 - 1`, which is
  :math:`(1 - e^{-|x+y|^2})/2` times that of PosRF: less than half for twice
  the features, so better than PosRF at equal feature dimension, too.

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

  info = ComponentInfo(
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

  def feature_dim(self, num_features, head_dim):
    """See `Component.feature_dim`."""
    del head_dim
    return 2 * num_features

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    del side
    both = self.query_features(x, rows, state).log_magnitude
    shift = self.gaussian_shift(x) - half_square(x) - 0.5 * math.log(2.0)
    return LogFeatures(both + shift)

  def query_features(self, x, rows, state):
    """See `Component.query_features`."""
    del state
    projected = project(x, rows.w)
    return LogFeatures(jnp.concatenate([projected, -projected], axis=-1))

  def softmax_log_second_moment(self, x, y, state):
    """See `KernelComponent.softmax_log_second_moment`."""
    del state
    square = jnp.sum(jnp.square(x + y), axis=-1)
    return 2.0 * jnp.sum(x * y, axis=-1) + log_cosh(square)
