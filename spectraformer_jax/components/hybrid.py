"""Hybrid features: a mixture of positive and trigonometric estimates."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.components import base
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Projection,
  Side,
  WeightSample,
)

MIXINGS = ("angular", "gaussian")


@base.COMPONENTS.register("hrf")
@dataclasses.dataclass(frozen=True)
class HRF(base.KernelComponent):
  r"""Hybrid random features (HRF).

  .. math::
    \hat K = \hat\lambda(x, y)\, \hat K_{pos}
      + (1 - \hat\lambda(x, y))\, \hat K_{trig}

  Both estimates use the same W: hyperbolic positive features are good where x
  and y oppose each other, trigonometric ones where they agree. The weight
  :math:`\hat\lambda` has features of its own, from a second projection T
  ``[n, H]`` that is independent of W.

  - "angular": :math:`\lambda = \theta / \pi`, :math:`\theta` the angle between
    x and y: :math:`\psi(x) = n^{-1/2} \mathrm{sign}(T x)`,
    :math:`\hat\lambda = (1 - \psi(x) \cdot \psi(y)) / 2`. Where |x| = |y| the
    estimate is exact at both ends, y = x and y = -x. No gradient flows through
    the signs.
  - "gaussian": :math:`\lambda = \exp(-|x + y|^2 / 2\tau^2)`: :math:`\psi(x) =
    n^{-1/2} [\cos(T x/\tau), \pm\sin(T x/\tau)]`; exact at y = -x.

  A product of two estimates takes the outer product of their features, a sum
  their concatenation; minus signs go to the keys. With v the variance of one
  row of :math:`\hat\lambda`, the relative second moment of one row of W is
  :math:`a \cosh|x+y|^2 + b \cosh|x-y|^2 + c \cos(|x|^2 - |y|^2)`, where
  :math:`a = \lambda^2 + v/n,\; b = (1-\lambda)^2 + v/n,\; c = 2(\lambda
  (1-\lambda) - v/n)`; :math:`v = \lambda (1-\lambda)` if angular, :math:`(1 +
  \lambda^4)/2 - \lambda^2` if gaussian. The last term is the gain of sharing W
  between the two estimates.

  Features are signed; `ComponentInfo.positive` says what attention does then.

  Args:
    kernel: "softmax" or "gaussian".
    mixing: which :math:`\lambda`: "angular" or "gaussian".
    num_mixing_rows: n, rows of T.
    tau: width of the Gaussian :math:`\lambda`, None for 1.
    independent: whether T is drawn independently of W. Must be True, causal or
      not: a T that shares rows with W biases the estimate.

  Raises:
    ValueError: unknown kernel or mixing, n that is not a positive integer, a
      tau that is not positive, a tau for the angular one, or dependent
      projections.

  References:
    Choromanski et al., Hybrid Random Features, 2021, the angular and the
    Gaussian hybrid (2110.04367).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("hrf", "orf", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jnp.ones((1, 1, 4)) / 2
    >>> phi, psi = (fm.apply(v, x, side=side) for side in ("query", "key"))
    >>> phi.shape
    (1, 1, 576)
    >>> bool(jnp.isclose(jnp.sum(phi * psi), fm.kernel(v, x, x)[0, 0]))
    True
  """

  mixing: str = "angular"
  num_mixing_rows: int = 8
  tau: float | None = None
  # Not stored, since only True is accepted.
  independent: dataclasses.InitVar[bool] = True

  def __post_init__(self, independent: bool) -> None:
    super().__post_init__()
    check_choice("mixing", self.mixing, MIXINGS)
    check_positive_int("num_mixing_rows", self.num_mixing_rows)
    if self.tau is not None and self.mixing == "angular":
      raise ValueError(
        f"tau={self.tau!r} is for mixing='gaussian' only, got mixing='angular'"
        ": leave tau out, or set mixing='gaussian'."
      )
    if self.tau is not None and not self.tau > 0:
      raise ValueError(f"tau must be positive, got {self.tau!r}.")
    if independent is not True:
      raise ValueError(
        f"independent={independent!r}: a second projection that depends "
        "on W biases the estimate, causal or not; leave it True."
      )

  def _info(self) -> base.ComponentInfo:
    """Returns the facts; the feature dim depends on the mixing."""
    angular = self.mixing == "angular"
    return base.ComponentInfo(
      name="hrf",
      family="hybrid",
      estimates="softmax or Gaussian kernel",
      formula=(
        "[P, psi P, R, psi R] / sqrt 2" if angular else "[psi P, R, psi R]"
      )
      + ": P of posrf_hyp, R of trigrf, psi of an independent projection",
      positive=False,
      features="4M(n+1)" if angular else "8Mn + 2M",
      variance="a cosh|x+y|^2 + b cosh|x-y|^2 + c cos(|x|^2 - |y|^2) - 1",
      cost="M exponentials, M cosines and sines, F products",
      good_for="kernel estimates where most angles are near 0 or pi",
      avoid="attention: random vectors are nearly orthogonal, F is 36 M",
      source="2110.04367, angular and Gaussian hybrids",
      even=True,
    )

  info = base.info_from_options(_info)

  @override
  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    n = self.num_mixing_rows
    if self.mixing == "angular":
      return 4 * num_features * (n + 1)
    return 2 * num_features * (4 * n + 1)

  @override
  def draw(self, rng: Array, num_features: int, head_dim: int) -> Projection:
    """Draws T, which does not depend on W."""
    shape = (self.num_mixing_rows, head_dim)
    return {"mixing": jax.random.normal(rng, shape, dtype=jnp.float32)}

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    projected = base.project(x, rows.w)
    half = base.half_square(x)
    positive_log = jnp.concatenate([projected, -projected], axis=-1)
    positive_log -= half + 0.5 * math.log(2.0)
    trig = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], axis=-1)
    psi = self._mixing_features(x, side, state)
    # The term of K with -psi(x).psi(y) has its minus sign on the keys.
    sign = 1.0 if side == "query" else -1.0
    ones = jnp.ones_like(trig)
    if self.mixing == "angular":
      factors = (ones, sign * _outer(psi, ones), trig, _outer(psi, trig))
      positive_copies, scale = psi.shape[-1] + 1, -0.5 * math.log(2.0)
    else:
      factors = (_outer(psi, ones), trig, sign * _outer(psi, trig))
      positive_copies, scale = psi.shape[-1], 0.0
    factor = jnp.concatenate(factors, axis=-1)
    trig_size = factor.shape[-1] - positive_copies * trig.shape[-1]
    log_magnitude = jnp.concatenate(
      [
        jnp.tile(positive_log, (1, positive_copies)),
        jnp.broadcast_to(half, (x.shape[0], trig_size)),
      ],
      axis=-1,
    )
    return LogFeatures(log_magnitude + scale + self.gaussian_shift(x), factor)

  @override
  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    weight, variance = self._mixing_law(x, y)
    noise = variance / self.num_mixing_rows
    positive, trig = (
      base.log_cosh(jnp.sum(z**2, axis=-1)) for z in (x + y, x - y)
    )
    top = jnp.maximum(positive, trig)
    shared = jnp.cos(jnp.sum(x**2, axis=-1) - jnp.sum(y**2, axis=-1))
    total = 2.0 * (weight * (1.0 - weight) - noise) * shared * jnp.exp(-top)
    total += (weight**2 + noise) * jnp.exp(positive - top) + (
      (1.0 - weight) ** 2 + noise
    ) * jnp.exp(trig - top)
    return 2.0 * jnp.sum(x * y, axis=-1) + top + jnp.log(total)

  def _mixing_features(
    self, x: Array, side: Side, state: ComponentState
  ) -> Array:
    """Returns the features psi, ``[T, n]`` or ``[T, 2n]``."""
    projected = base.project(x, state.random["mixing"].astype(x.dtype))
    scale = self.num_mixing_rows**-0.5
    if self.mixing == "angular":
      return scale * jnp.where(projected < 0.0, -1.0, 1.0)
    angles = projected / self._width
    sine = jnp.sin(angles) if side == "query" else -jnp.sin(angles)
    return scale * jnp.concatenate([jnp.cos(angles), sine], axis=-1)

  def _mixing_law(self, x: Array, y: Array) -> tuple[Array, Array]:
    """Returns lambda(x, y), and its estimate's variance with one row of T."""
    if self.mixing == "angular":
      weight = base.angle(x, y) / math.pi
      return weight, weight * (1.0 - weight)
    square = jnp.sum(jnp.square(x + y), axis=-1)
    weight = jnp.exp(-0.5 * square / self._width**2)
    return weight, 0.5 * (1.0 + weight**4) - weight**2

  @property
  def _width(self) -> float:
    """The tau of the Gaussian lambda."""
    return 1.0 if self.tau is None else self.tau


def _outer(psi: Array, features: Array) -> Array:
  """Returns the outer products ``[T, n * R]`` of ``[T, n]`` and ``[T, R]``."""
  products = psi[:, :, None] * features[:, None, :]
  return jnp.reshape(products, (features.shape[0], -1))
