r"""Isotropic kernels as mixtures of Gaussian kernels: one class a mixing law.

Every isotropic kernel that is positive definite in all dimensions is

.. math:: K(r) = E \exp(-T r^2 / 2), \qquad r = |x - y|

for one law of T > 0 (Schoenberg). If g is a Gaussian row, :math:`\sqrt T g` is
a row whose cosines estimate K. A `MixingLaw` has what features and exact
attention need: a sampler of T, its density, and K in closed form. A new law is
one class here, registered by name: components and `exact_attention` find it in
`LAWS`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp, ndtri
from typing_extensions import override

from spectraformer_jax.mixing_laws.special import (
  LOG_2,
  log_beta,
  log_gamma_draw,
  log_kummer,
  log_stable_density,
  log_stable_draw,
  power,
)
from spectraformer_jax.registry import Registry, check_choice
from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices.pieces import chi_ppf

LAWS = Registry("law")

# Smoothness of the Matern kernels that are elementary functions.
HALF_INTEGERS = (0.5, 1.5, 2.5)

# Range of alpha: the quadratures below are accurate in it. At 2 the kernel is
# the Gaussian one.
ALPHA_RANGE = (0.5, 1.8)


@dataclasses.dataclass(frozen=True)
class MixingLaw:
  """Base of the laws of T; s is log T.

  Subclasses are frozen dataclasses whose fields are the shape of the kernel.

  Attributes:
    kernel: K as text, for tables.
    num_uniforms: uniforms that one draw of T needs.
    needs_cap: the mean of T, and so the variance of a feature's gradient, is
      infinite, or T has a power tail.
  """

  kernel: ClassVar[str]
  num_uniforms: ClassVar[int] = 1
  needs_cap: ClassVar[bool] = True

  def log_scale(self, uniform: Array) -> Array:
    """Returns draws of s, for uniforms ``[num_uniforms, ...]`` in (0, 1)."""
    raise NotImplementedError

  def log_density(self, log_scale: Array) -> Array:
    """Returns the log density of s, ``[...] -> [...]``."""
    raise NotImplementedError

  def log_kernel(self, square: Array) -> Array:
    """Returns log K for r^2 ``[...]``; its gradient at 0 is finite."""
    raise NotImplementedError


@LAWS.register("laplacian")
@dataclasses.dataclass(frozen=True)
class Laplacian(MixingLaw):
  r"""The Laplacian kernel, :math:`e^{-r}`; T = 1/n^2 with n ~ N(0, 1).

  Example:
    >>> float(Laplacian().log_kernel(jnp.float32(4.0)))
    -2.0
  """

  kernel = "exp(-r)"

  @override
  def log_scale(self, uniform: Array) -> Array:
    return -2.0 * jnp.log(-ndtri(0.5 * uniform[0]))

  @override
  def log_density(self, log_scale: Array) -> Array:
    density = log_scale + jnp.exp(-log_scale)
    return -0.5 * (math.log(2.0 * math.pi) + density)

  @override
  def log_kernel(self, square: Array) -> Array:
    return -power(square, 0.5)


@LAWS.register("matern")
@dataclasses.dataclass(frozen=True)
class Matern(MixingLaw):
  r"""Matern kernels, with :math:`t = \sqrt{2 \nu}\, r` and T = nu / Gamma(nu).

  .. math:: e^{-t}, \quad (1 + t) e^{-t}, \quad (1 + t + t^2/3) e^{-t}

  Args:
    nu: smoothness, 0.5 (the Laplacian kernel), 1.5 or 2.5.

  Raises:
    ValueError: any other nu.

  References:
    Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006,
    section 4.2.

  Example:
    >>> round(float(jnp.exp(Matern(2.5).log_kernel(jnp.float32(4.0)))), 4)
    0.1387
  """

  kernel = "Matern(r)"
  nu: float = 1.5

  def __post_init__(self) -> None:
    check_choice("nu", self.nu, HALF_INTEGERS)

  @override
  def log_scale(self, uniform: Array) -> Array:
    root = chi_ppf(1.0 - uniform[0], 2.0 * self.nu)
    return math.log(2.0 * self.nu) - 2.0 * jnp.log(root)

  @override
  def log_density(self, log_scale: Array) -> Array:
    constant = self.nu * math.log(self.nu) - math.lgamma(self.nu)
    return constant - self.nu * (log_scale + jnp.exp(-log_scale))

  @override
  def log_kernel(self, square: Array) -> Array:
    t = power(2.0 * self.nu * square, 0.5)
    if self.nu == 0.5:
      return -t
    factor = t if self.nu == 1.5 else t + jnp.square(t) / 3.0
    return jnp.log1p(factor) - t


@LAWS.register("rational_quadratic")
@dataclasses.dataclass(frozen=True)
class RationalQuadratic(MixingLaw):
  r"""Rational quadratic kernels, :math:`(1 + r^2 / 2b)^{-b}`; T = Gamma(b)/b.

  Args:
    b: power of the tail, at least 0.25. The larger, the more Gaussian.

  Raises:
    ValueError: b below 0.25.

  References:
    Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006,
    equation 4.19.

  Example:
    >>> float(jnp.exp(RationalQuadratic(b=2.0).log_kernel(jnp.float32(4.0))))
    0.25
  """

  kernel = "(1 + r^2/2b)^-b"
  needs_cap = False
  b: float = 2.0

  def __post_init__(self) -> None:
    check_shape("b", self.b)

  @override
  def log_scale(self, uniform: Array) -> Array:
    return log_gamma_draw(uniform[0], self.b) - math.log(self.b)

  @override
  def log_density(self, log_scale: Array) -> Array:
    constant = self.b * math.log(self.b) - math.lgamma(self.b)
    return constant + self.b * (log_scale - jnp.exp(log_scale))

  @override
  def log_kernel(self, square: Array) -> Array:
    return -self.b * jnp.log1p(square / (2.0 * self.b))


@LAWS.register("exp_power")
@dataclasses.dataclass(frozen=True)
class ExpPower(MixingLaw):
  r"""Exponentials of a power, :math:`e^{-r^\alpha}`; T is twice a stable draw.

  Args:
    alpha: the power, from 0.5 to 1.8; 1 is the Laplacian kernel.

  Raises:
    ValueError: alpha outside its range.

  References:
    Kanter, Stable densities under change of scale and total variation
    inequalities, 1975 (the sampler); Zolotarev, One-dimensional stable
    distributions, 1986 (the density).

  Example:
    >>> round(float(ExpPower(alpha=1.5).log_kernel(jnp.float32(4.0))), 4)
    -2.8284
  """

  kernel = "exp(-r^alpha)"
  num_uniforms = 2
  alpha: float = 1.5

  def __post_init__(self) -> None:
    check_alpha(self.alpha)

  @override
  def log_scale(self, uniform: Array) -> Array:
    return LOG_2 + log_stable_draw(uniform[0], uniform[1], 0.5 * self.alpha)

  @override
  def log_density(self, log_scale: Array) -> Array:
    return log_stable_density(log_scale - LOG_2, 0.5 * self.alpha)

  @override
  def log_kernel(self, square: Array) -> Array:
    return -power(square, 0.5 * self.alpha)


@LAWS.register("gen_cauchy")
@dataclasses.dataclass(frozen=True)
class GeneralisedCauchy(MixingLaw):
  r"""Generalised Cauchy kernels, :math:`(1 + r^\alpha)^{-b}`.

  T is twice a stable draw times :math:`R^{2 / \alpha}` with R of the law
  Gamma(b): a Gamma mixture of `ExpPower` kernels.

  Args:
    alpha: power at short distance, from 0.5 to 1.8.
    b: at least 0.25; the kernel falls like :math:`r^{-\alpha b}`.

  Raises:
    ValueError: alpha or b outside its range.

  References:
    Gneiting and Schlather, Stochastic models that separate fractal dimension
    and the Hurst effect, 2004 (physics/0109031).

  Example:
    >>> law = GeneralisedCauchy(alpha=1.0, b=1.0)
    >>> round(float(jnp.exp(law.log_kernel(jnp.float32(9.0)))), 6)
    0.25
  """

  kernel = "(1 + r^alpha)^-b"
  num_uniforms = 3
  alpha: float = 1.0
  b: float = 1.0

  def __post_init__(self) -> None:
    check_alpha(self.alpha)
    check_shape("b", self.b)

  @override
  def log_scale(self, uniform: Array) -> Array:
    stable = log_stable_draw(uniform[0], uniform[1], 0.5 * self.alpha)
    gamma = log_gamma_draw(uniform[2], self.b)
    return LOG_2 + stable + 2.0 / self.alpha * gamma

  @override
  def log_density(self, log_scale: Array) -> Array:
    # A sum over log R; both factors fall off inside this range.
    step = 0.1
    log_r = step * np.arange(-600, 50, dtype=np.float32)
    log_weight = self.b * log_r - np.exp(log_r) - math.lgamma(self.b)

    def one(log_scale: Array) -> Array:
      rest = log_scale - LOG_2 - 2.0 / self.alpha * log_r
      density = log_stable_density(rest, 0.5 * self.alpha)
      return logsumexp(log_weight + density) + math.log(step)

    flat = jax.lax.map(one, jnp.reshape(log_scale, (-1,)))
    return jnp.reshape(flat, jnp.shape(log_scale))

  @override
  def log_kernel(self, square: Array) -> Array:
    return -self.b * jnp.log1p(power(square, 0.5 * self.alpha))


@LAWS.register("kummer")
@dataclasses.dataclass(frozen=True)
class Kummer(MixingLaw):
  r"""Kummer's function :math:`{}_1F_1(a; a + b; -r^2)`; T = 2 Beta(a, b).

  T is at most 2, so the kernel is smooth at 0, and falls like
  :math:`r^{-2a}`.

  Args:
    a: power of the tail, at least 0.25.
    b: at least 0.25.

  Raises:
    ValueError: a or b below 0.25.

  References:
    NIST Digital Library of Mathematical Functions, 13.4.1.

  Example:
    >>> law = Kummer(a=1.0, b=1.0)  # (1 - exp(-r^2)) / r^2
    >>> round(float(jnp.exp(law.log_kernel(jnp.float32(1.0)))), 5)
    0.63212
  """

  kernel = "1F1(a; a+b; -r^2)"
  num_uniforms = 2
  needs_cap = False
  a: float = 1.0
  b: float = 1.0

  def __post_init__(self) -> None:
    check_shape("a", self.a)
    check_shape("b", self.b)

  @override
  def log_scale(self, uniform: Array) -> Array:
    one, other = (
      log_gamma_draw(u, shape)
      for u, shape in zip(uniform, (self.a, self.b), strict=True)
    )
    return LOG_2 + one - jnp.logaddexp(one, other)

  @override
  def log_density(self, log_scale: Array) -> Array:
    log_r = log_scale - LOG_2
    inside = log_r < 0.0
    log_rest = jnp.log(-jnp.expm1(jnp.where(inside, log_r, -1.0)))
    density = self.a * log_r + (self.b - 1.0) * log_rest
    return jnp.where(inside, density - log_beta(self.a, self.b), -jnp.inf)

  @override
  def log_kernel(self, square: Array) -> Array:
    return log_kummer(self.a, self.b, square)


def build_law(
  law: str | MixingLaw, options: Mapping[str, Any] | None = None
) -> MixingLaw:
  """Returns the law of this name and options, or the object itself.

  Args:
    law: a name of `LAWS`, or a `MixingLaw`.
    options: of the law; a law that is an object has its own.

  Raises:
    ValueError: unknown name or option, or options beside an object.

  Example:
    >>> build_law("matern", {"nu": 2.5})
    Matern(nu=2.5)
  """
  if not isinstance(law, MixingLaw):
    return LAWS.build(law, options)
  if options:
    raise ValueError(
      f"law={law!r} has its own options: give {', '.join(options)} to it."
    )
  return law


def check_shape(name: str, value: float) -> None:
  """Raises ValueError for a shape below 0.25, or one that is not finite."""
  if not 0.25 <= value < math.inf:
    raise ValueError(f"{name} must be at least 0.25 and finite, got {value!r}.")


def check_alpha(alpha: float) -> None:
  """Raises ValueError for an alpha outside `ALPHA_RANGE`."""
  low, high = ALPHA_RANGE
  if not low <= alpha <= high:
    raise ValueError(
      f"alpha must be from {low} to {high}, got {alpha!r}; the kernel of alpha="
      "2 is 'gaussian'."
    )
