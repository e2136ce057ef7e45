"""Positive features: exponentials of W x."""

import dataclasses

from spectraformer_jax.components.base import (
  COMPONENTS,
  ComponentInfo,
  KernelComponent,
  half_square,
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
    del side, state
    exponent = project(x, rows.w) - half_square(x)
    return LogFeatures(exponent + self.gaussian_shift(x))
