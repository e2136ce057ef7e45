"""Laws of random degrees: quantiles, factorials, the best parameter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, i0e

from spectraformer_jax.typing import Array

# With exact uniforms the estimate would be unbiased for every parameter. Stored
# uniforms have 23 bits, so events less likely than 2**-24 never occur and the
# estimate lacks their share. In these ranges that share is below 4 % of the
# kernel at |x_l y_l| = 1.
RATE_RANGE = (1e-2, 8.0)
POISSON_TABLE = 80  # number of entries, and the largest degree

P_RANGE = (1e-3, 0.99)
P_GRID = 64

# From this n on, the error of two terms of Stirling's series is below 1e-7.
STIRLING_FROM = 8


def poisson_degrees(uniform: Array, rate: Array) -> Array:
  """Returns the Poisson(rate) quantiles of `uniform`, float32.

  The quantile is the number of k with u > cdf(k). Both sides are compared on a
  scale that keeps the digits of small u and of small 1 - u: -1/u below a half,
  1/(1 - u) above.
  """
  k = np.arange(POISSON_TABLE + 1, dtype=np.float32)
  mass = jnp.exp(k * jnp.log(rate) - rate - gammaln(k + 1.0))
  cdf = jnp.cumsum(mass)[:-1]
  tail = jnp.cumsum(mass[::-1])[::-1][1:]
  cdf = jnp.where(cdf < 0.5, -1.0 / cdf, 1.0 / tail)
  uniform = jnp.where(uniform < 0.5, -1.0 / uniform, 1.0 / (1.0 - uniform))
  cdf = jnp.reshape(cdf, (1,) * uniform.ndim + (-1,))
  return jnp.sum(uniform[..., None] > cdf, axis=-1, dtype=jnp.float32)


def geometric_degrees(uniform: Array, p: Array) -> Array:
  """Returns the quantiles of P(N = n) = p (1 - p)^n, n >= 0, float32."""
  return jnp.floor(jnp.log1p(-uniform) / jnp.log1p(-p))


def stirling_rest(n: Array) -> Array:
  """Returns log n! - (n log n - n), float32, for integers n >= 0."""
  small = np.arange(1, STIRLING_FROM)
  exact = [math.lgamma(k + 1.0) - k * math.log(k) + k for k in small]
  table = jnp.asarray([0.0, *exact], jnp.float32)
  large = jnp.maximum(n, STIRLING_FROM)
  series = 0.5 * jnp.log(2.0 * math.pi * large) + 1.0 / (12.0 * large)
  series -= 1.0 / (360.0 * large**3)
  index = jnp.minimum(n, STIRLING_FROM - 1).astype(jnp.int32)
  return jnp.where(n < STIRLING_FROM, table[index], series)


def optimal_p(product: Array) -> Array:
  r"""Returns the p with the smallest log second moment of `GeomRF`.

  .. math:: -H \log p + \sum_l \log I_0(2 m_l / \sqrt{1 - p})

  Evaluates a grid over the logit of p, then fits a parabola to the smallest
  value and its neighbours.

  Args:
    product: m, ``[H]``, non-negative: typical sizes of x_l y_l.
  """
  low, high = (math.log(p / (1.0 - p)) for p in P_RANGE)
  grid = np.linspace(low, high, P_GRID, dtype=np.float32)
  p = jax.nn.sigmoid(grid)
  argument = 2.0 * product[None, :] / jnp.sqrt(1.0 - p)[:, None]
  log_bessel = jnp.log(i0e(argument)) + argument
  values = jnp.sum(log_bessel - jnp.log(p)[:, None], axis=-1)
  index = jnp.clip(jnp.argmin(values), 1, P_GRID - 2)
  before, here, after = (values[index + step] for step in (-1, 0, 1))
  curvature = jnp.maximum(before - 2.0 * here + after, 1e-30)
  offset = jnp.clip(0.5 * (before - after) / curvature, -1.0, 1.0)
  step = (high - low) / (P_GRID - 1)
  place = index.astype(offset.dtype) + offset
  return jnp.clip(jax.nn.sigmoid(low + step * place), *P_RANGE)
