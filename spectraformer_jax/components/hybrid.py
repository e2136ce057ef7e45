"""Hybrid features: positive where x and y oppose, trigonometric where not."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.components.base import (
  COMPONENTS,
  ComponentInfo,
  KernelComponent,
  angle,
  half_square,
  log_cosh,
  project,
)
from spectraformer_jax.typing import LogFeatures

MIXINGS = ("angular", "gaussian")


@COMPONENTS.register("hrf")
@dataclasses.dataclass(frozen=True)
class HRF(KernelComponent):
  r"""Hybrid random features (HRF).

  .. math::
    \hat K = \hat\lambda(x, y)\, \hat K_{pos}
      + (1 - \hat\lambda(x, y))\, \hat K_{trig}

  with both estimates from one W (hyperbolic positive and trigonometric
  features, the worse where the other is good) and :math:`\hat\lambda`, by
  features of its own, from a second projection T ``[n, H]`` that is drawn
  beside W and independent of it.

  - "angular": :math:`\lambda = \theta / \pi`, :math:`\theta` the angle between
    x and y: :math:`\psi(x) = n^{-1/2} \mathrm{sign}(T x)`,
    :math:`\hat\lambda = (1 - \psi(x) \cdot \psi(y)) / 2`. Where |x| = |y| the
    estimate is exact at both ends, y = x and y = -x. No gradient flows through
    the signs.
  - "gaussian": :math:`\lambda = \exp(-|x + y|^2 / 2\tau^2)`: :math:`\psi(x) =
    n^{-1/2} [\cos(T x/\tau), \pm\sin(T x/\tau)]`; exact at y = -x.

  Products of features are outer products, sums are concatenations, and minus
  signs go to the keys. With v the variance of one row of
  :math:`\hat\lambda`, the relative second moment of one row of W is
  :math:`a \cosh|x+y|^2 + b \cosh|x-y|^2 + c \cos(|x|^2 - |y|^2)`, where
  :math:`a = \lambda^2 + v/n,\; b = (1-\lambda)^2 + v/n,\; c = 2(\lambda
  (1-\lambda) - v/n)`; :math:`v = \lambda (1-\lambda)` if angular,
  :math:`(1 + \lambda^4)/2 - \lambda^2` if gaussian. The last term is what
  sharing W between the two estimates gains.

  Features are signed, so the normalizer of attention can come out near zero or
  negative; it is kept away from zero, which biases the output where that
  happens and doubles the cost of the sums.

  Args:
    kernel: "softmax" or "gaussian".
    mixing: which :math:`\lambda`: "angular" or "gaussian".
    num_mixing_rows: n, rows of T.
    tau: width of the Gaussian :math:`\lambda`, None for 1.
    independent: that T is drawn apart from W. Always: False, causal or not, is
      an error, as a T that shares rows with W biases the estimate.

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
  # Checked, not kept: there is nothing to choose.
  independent: dataclasses.InitVar[bool] = True

  def __post_init__(self, independent):
    super().__post_init__()
    if self.mixing not in MIXINGS:
      raise ValueError(f"mixing must be one of {MIXINGS}, got {self.mixing!r}.")
    check_positive_int("num_mixing_rows", self.num_mixing_rows)
    if self.tau is not None and self.mixing == "angular":
      raise ValueError(
        f"tau={self.tau!r} is for mixing='gaussian' alone: leave it out, or "
        "choose that."
      )
    if self.tau is not None and not self.tau > 0:
      raise ValueError(f"tau must be positive, got {self.tau!r}.")
    if independent is not True:
      raise ValueError(
        f"independent={independent!r}: a second projection that depends "
        "on W biases the estimate, causal or not; leave it True."
      )

  @property
  def info(self):
    """Facts; the feature dim depends on the mixing."""
    angular = self.mixing == "angular"
    return ComponentInfo(
      name="hrf",
      family="hybrid",
      estimates="softmax or Gaussian kernel",
      formula=(
        "[P, psi P, R, psi R] / sqrt 2" if angular else "[psi P, R, psi R]"
      )
      + ": P of posrf_hyp, R of trigrf, psi of an independent projection",
      positive=False,
      features="4M(n+1)" if angular else "8Mn + 2M",
      variance=("a cosh|x+y|^2 + b cosh|x-y|^2 + c cos(|x|^2 - |y|^2) - 1"),
      cost="M exponentials, M cosines and sines, F products",
      good_for="kernel estimates where most angles are near 0 or pi",
      avoid="attention: random vectors are nearly orthogonal, F is 36 M",
      source="2110.04367, angular and Gaussian hybrids",
      even=True,
    )

  def feature_dim(self, num_features, head_dim):
    """See `Component.feature_dim`."""
    del head_dim
    n = self.num_mixing_rows
    if self.mixing == "angular":
      return 4 * num_features * (n + 1)
    return 2 * num_features * (4 * n + 1)

  def draw(self, rng, num_features, head_dim):
    """See `Component.draw`: T, independent of W."""
    del num_features
    return {
      "mixing": jax.random.normal(
        rng, (self.num_mixing_rows, head_dim), dtype=jnp.float32
      )
    }

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    projected = project(x, rows.w)
    half = half_square(x)
    positive_log = jnp.concatenate([projected, -projected], axis=-1)
    positive_log -= half + 0.5 * math.log(2.0)
    trig = jnp.concatenate([jnp.cos(projected), jnp.sin(projected)], axis=-1)
    psi = self._mixing_features(x, side, state)
    # The keys' minus sign is that of the term with psi(x).psi(y) < 0 in K.
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

  def softmax_log_second_moment(self, x, y, state):
    """See `KernelComponent.softmax_log_second_moment`."""
    del state
    weight, variance = self._mixing_law(x, y)
    noise = variance / self.num_mixing_rows
    terms = (
      (weight**2 + noise, log_cosh(jnp.sum((x + y) ** 2, axis=-1))),
      ((1.0 - weight) ** 2 + noise, log_cosh(jnp.sum((x - y) ** 2, axis=-1))),
    )
    top = jnp.maximum(terms[0][1], terms[1][1])
    shared = jnp.cos(jnp.sum(x**2, axis=-1) - jnp.sum(y**2, axis=-1))
    total = 2.0 * (weight * (1.0 - weight) - noise) * shared * jnp.exp(-top)
    total += sum(share * jnp.exp(size - top) for share, size in terms)
    return 2.0 * jnp.sum(x * y, axis=-1) + top + jnp.log(total)

  def _mixing_features(self, x, side, state):
    """Features psi ``[T, n]`` or ``[T, 2n]``."""
    projected = project(x, state.random["mixing"].astype(x.dtype))
    scale = self.num_mixing_rows**-0.5
    if self.mixing == "angular":
      return scale * jnp.where(projected < 0.0, -1.0, 1.0)
    angles = projected / self._width
    sine = jnp.sin(angles) if side == "query" else -jnp.sin(angles)
    return scale * jnp.concatenate([jnp.cos(angles), sine], axis=-1)

  def _mixing_law(self, x, y):
    """lambda(x, y), and the variance of its estimate by one row of T."""
    if self.mixing == "angular":
      weight = angle(x, y) / math.pi
      return weight, weight * (1.0 - weight)
    square = jnp.sum(jnp.square(x + y), axis=-1)
    weight = jnp.exp(-0.5 * square / self._width**2)
    return weight, 0.5 * (1.0 + weight**4) - weight**2

  @property
  def _width(self) -> float:
    """Tau of the Gaussian lambda."""
    return 1.0 if self.tau is None else self.tau


def _outer(psi, features):
  """Flat products ``[T, n * R]`` of ``[T, n]`` and ``[T, R]``, R innermost."""
  products = psi[:, :, None] * features[:, None, :]
  return jnp.reshape(products, (features.shape[0], -1))
