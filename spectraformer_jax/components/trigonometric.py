"""Trigonometric features: cosines and sines of W x."""

import dataclasses

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


@COMPONENTS.register("trigrf")
@dataclasses.dataclass(frozen=True)
class TrigRF(KernelComponent):
  r"""Trigonometric random features (TrigRF).

  .. math::
    f(\omega, x) = e^{h(x)} [\cos \omega^\top x, \sin \omega^\top x],
    \qquad h(x) = |x|^2 / 2 \text{ (softmax)},\; 0 \text{ (gaussian)}

  One row has relative variance :math:`\cosh |x - y|^2 - 1` (softmax): exact at
  x = y, exploding with the distance. Features are signed, so the normalizer of
  attention can come out near zero or negative; it is kept away from zero,
  which biases the output where that happens.

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

  info = ComponentInfo(
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

  def feature_dim(self, num_features, head_dim):
    """See `Component.feature_dim`."""
    return 2 * num_features

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    del side, state
    angles = project(x, rows.w)
    factor = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return LogFeatures(half_square(x) + self.gaussian_shift(x), factor)

  def softmax_log_second_moment(self, x, y, state):
    """See `KernelComponent.softmax_log_second_moment`."""
    del state
    square = jnp.sum(jnp.square(x - y), axis=-1)
    return 2.0 * jnp.sum(x * y, axis=-1) + log_cosh(square)
