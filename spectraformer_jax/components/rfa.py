"""Random feature attention: trigonometric features of directions."""

import dataclasses
import math

import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Params,
  Side,
  WeightSample,
)

LEARNED = ("scalar", "per_dim", "none")

# Shorter vectors count as zero, which has no direction.
SMALLEST_NORM = 1e-12


@base.COMPONENTS.register("rfa")
@dataclasses.dataclass(frozen=True)
class RFA(base.Component):
  r"""Random feature attention (RFA): directions, with a learned temperature.

  .. math::
    f(\omega, x) = [\sin \omega^\top (u / \sigma), \cos \omega^\top (u /
      \sigma)], \quad u = x / |x|, \qquad
    K = e^{-|u/\sigma - v/\sigma|^2 / 2} = e^{-(1 - u \cdot v)/\sigma^2}

  with v the direction of y (the last form holds for a scalar :math:`\sigma`):
  softmax attention of cosine similarities at temperature :math:`\sigma^2`. The
  relative variance of one row is :math:`\cosh |u/\sigma - v/\sigma|^2 - 1`. A
  zero vector has direction 0, which is equally far from all others.

  Features are signed; `ComponentInfo.positive` says what attention does then.
  The paper's gate is not part of a feature map.

  Args:
    sigma: initial width.
    learned: which widths are trained, through their logarithms: "scalar" (one),
      "per_dim" (one per coordinate) or "none".

  Raises:
    ValueError: a sigma that is not positive, or unknown `learned`.

  References:
    Peng et al., Random Feature Attention, 2021, section 3.1 (2103.02143).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("rfa", "orf", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> v.params["component"]["log_sigma"].shape
    (1,)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 32)
  """

  sigma: float = 1.0
  learned: str = "scalar"

  features_per_row = 2
  info = base.ComponentInfo(
    name="rfa",
    family="trigonometric",
    estimates="exp(-|u - v|^2 / 2 sigma^2), u and v the directions",
    formula="[sin w.u/sigma, cos w.u/sigma]",
    positive=False,
    features="2M",
    variance="cosh(|u - v|^2/sigma^2) - 1",
    cost="M cosines and M sines",
    good_for="attention by cosine similarity, causal or not",
    avoid="queries or keys whose norms matter",
    source="2103.02143, section 3.1",
    even=True,
  )

  def __post_init__(self) -> None:
    if not self.sigma > 0:
      raise ValueError(f"sigma must be positive, got {self.sigma!r}.")
    check_choice("learned", self.learned, LEARNED)

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    if self.learned == "none":
      return {}
    shape = (head_dim,) if self.learned == "per_dim" else ()
    return {"log_sigma": jnp.full(shape, math.log(self.sigma), jnp.float32)}

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    angles = base.project(self._scaled_direction(x, state), rows.w)
    factor = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return LogFeatures(jnp.zeros((x.shape[0], 1), x.dtype), factor)

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    return jnp.exp(-0.5 * self._square(x, y, state))

  @override
  def log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    square = self._square(x, y, state)
    return jnp.log(0.5 + 0.5 * jnp.exp(-2.0 * square))

  def _square(self, x: Array, y: Array, state: ComponentState) -> Array:
    """Returns the squared distance of the scaled directions."""
    u, v = (self._scaled_direction(z, state) for z in (x, y))
    return jnp.sum(jnp.square(u - v), axis=-1)

  def _scaled_direction(self, x: Array, state: ComponentState) -> Array:
    """Returns x / (|x| sigma), ``[..., H]``."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    has_direction = square > SMALLEST_NORM**2
    norm = jnp.sqrt(jnp.where(has_direction, square, 1.0))
    direction = jnp.where(has_direction, x / norm, 0.0)
    if self.learned == "none":
      return direction / self.sigma
    log_sigma = state.params["log_sigma"]
    width = jnp.broadcast_to(jnp.exp(-log_sigma), x.shape[-1:])
    return direction * jnp.reshape(width, (1,) * (x.ndim - 1) + (-1,))
