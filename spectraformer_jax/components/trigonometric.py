"""Trigonometric features: cosines and sines of W x."""

import dataclasses

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


@base.COMPONENTS.register("trigrf")
@dataclasses.dataclass(frozen=True)
class TrigRF(base.KernelComponent):
  r"""Trigonometric random features (TrigRF).

  .. math::
    f(\omega, x) = e^{h(x)} [\cos \omega^\top x, \sin \omega^\top x],
    \qquad h(x) = |x|^2 / 2 \text{ (softmax)},\; 0 \text{ (gaussian)}

  One row has relative variance :math:`\cosh |x - y|^2 - 1` (softmax): exact at
  x = y, exponential in :math:`|x - y|^2`. Features are signed;
  `ComponentInfo.positive` says what attention does then.

  Args:
    kernel: "softmax" or "gaussian".

  Raises:
    ValueError: unknown kernel.

  References:
    Rahimi and Recht 2007, Algorithm 1; softmax form in Choromanski et al.,
    Rethinking Attention with Performers, 2021, equation 8 (2009.14794).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "iid", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="query").shape
    (3, 1, 32)
  """

  features_per_row = 2
  info = base.ComponentInfo(
    name="trigrf",
    family="trigonometric",
    estimates="softmax or Gaussian kernel",
    formula="exp(h) [cos w.x, sin w.x]",
    positive=False,
    features="2M",
    variance="cosh|x-y|^2 - 1",
    cost="M cosines and M sines",
    good_for="kernel estimates at small distances; the Gaussian kernel",
    avoid="attention with spread-out scores: normalizers can vanish",
    source="Rahimi and Recht 2007; 2009.14794, equation 8",
    even=True,
  )

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    angles = base.project(x, rows.w)
    factor = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return LogFeatures(base.half_square(x) + self.gaussian_shift(x), factor)

  @override
  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    square = jnp.sum(jnp.square(x - y), axis=-1)
    return 2.0 * jnp.sum(x * y, axis=-1) + base.log_cosh(square)
