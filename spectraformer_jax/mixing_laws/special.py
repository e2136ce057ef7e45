"""Draws and functions that mixing laws are made of."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices.pieces import chi_ppf

LOG_2 = math.log(2.0)


def power(square: Array, exponent: float) -> Array:
  """Returns square ** exponent; its gradient is zero at 0, where it has none.

  Example:
    >>> float(jax.grad(power)(0.0, 0.5))
    0.0
  """
  is_zero = square == 0.0
  return jnp.where(is_zero, 0.0, jnp.where(is_zero, 1.0, square) ** exponent)


def log_gamma_draw(uniform: Array, shape: float) -> Array:
  """Returns the log of a draw of Gamma(shape), of rate 1, from a uniform."""
  return 2.0 * jnp.log(chi_ppf(uniform, 2.0 * shape)) - LOG_2


def log_beta(a: float, b: float) -> float:
  """Returns the log of the beta function."""
  return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def log_stable_draw(angle: Array, height: Array, index: float) -> Array:
  r"""Returns the log of a positive stable draw S, by Kanter's formula.

  .. math:: E e^{-\lambda S} = e^{-\lambda^{index}}

  Args:
    angle: uniforms in (0, 1), ``[...]``.
    height: independent uniforms of the same shape.
    index: in (0, 1).

  Example:
    >>> s = log_stable_draw(jnp.float32(0.3), jnp.float32(0.6), 0.75)
    >>> round(float(s), 4)
    -0.4101
  """
  log_exponential = jnp.log(-jnp.log(height))
  shape = _log_kanter(angle, 1.0 - angle, index)
  return (1.0 / index - 1.0) * (shape - log_exponential)


def log_stable_density(log_scale: Array, index: float) -> Array:
  """Returns the log density of log S for the S of `log_stable_draw`.

  A mean over the angle of that formula, where the height has a closed form. An
  even grid of 512 points in the logit of the angle; its error is below 1e-3.

  Args:
    log_scale: log S, ``[...]``.
    index: in (0, 1).
  """
  logit = np.linspace(-24.0, 24.0, 512, dtype=np.float32)
  log_weight = -np.logaddexp(0.0, logit) - np.logaddexp(0.0, -logit)
  log_weight += math.log(48.0 / 511.0)
  shape = _log_kanter(jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit), index)
  grid = (None,) * jnp.ndim(log_scale)
  # Log of the exponential variable that gives this S at each angle.
  log_height = shape[grid] - index / (1.0 - index) * log_scale[..., None]
  terms = log_weight[grid] + log_height - jnp.exp(log_height)
  return math.log(index / (1.0 - index)) + logsumexp(terms, axis=-1)


def _log_kanter(angle: Array, rest: Array, index: float) -> Array:
  """Returns the part of Kanter's formula that depends on the angle.

  Args:
    angle: over pi.
    rest: 1 - angle, with its own digits.
    index: in (0, 1).
  """
  angle, rest = math.pi * angle, math.pi * rest
  log_sin = jnp.log(jnp.sin(jnp.minimum(angle, rest)))
  ratio = index * jnp.log(jnp.sin(index * angle)) - log_sin
  return ratio / (1.0 - index) + jnp.log(jnp.sin((1.0 - index) * angle))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def log_kummer(a: float, b: float, z: Array) -> Array:
  """Returns log 1F1(a; a+b; -z), the log of E exp(-z R) with R ~ Beta(a, b).

  An even grid in the logit of R: 1e-6 for z up to 1e6.

  Args:
    a: positive.
    b: positive.
    z: at least 0, ``[...]``.
  """
  step = min(0.4, 0.9 / math.sqrt(a))
  # Down to the mode at z = 1e6, and on both sides as far as the tails reach.
  lowest = -14.0 - math.log1p(b / a) - 17.0 / a
  highest = 5.0 + math.log1p(a / b) + 17.0 / b
  logit = np.arange(lowest, highest, step)
  log_weight = -b * logit - (a + b) * np.logaddexp(0.0, -logit)
  log_weight += math.log(step) - log_beta(a, b)
  ratio = np.exp(-np.logaddexp(0.0, -logit)).astype(np.float32)
  grid = (None,) * jnp.ndim(z)
  exponent = log_weight.astype(np.float32)[grid] - z[..., None] * ratio[grid]
  return logsumexp(exponent, axis=-1)


@log_kummer.defjvp
def _log_kummer_jvp(
  a: float, b: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
  """The derivative of 1F1 is another one, so the grid is not kept."""
  (z,), (tangent,) = primals, tangents
  value = log_kummer(a, b, z)
  slope = -a / (a + b) * jnp.exp(log_kummer(a + 1.0, b, z) - value)
  return value, slope * tangent
