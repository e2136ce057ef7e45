"""Floats as a mantissa near 1 times a whole power of two, without rounding.

Features are exponentials, which can leave the range of float32. So features and
sums over them are divided by a power of two, which later cancels without
rounding. Results therefore do not depend on which key had the largest exponent,
nor on how a sequence was split. (Terms 2^150 times smaller than the largest
one are lost.)
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from spectraformer_jax.typing import Array

# The exponent of a state without keys: below that of every key, and exact in
# float32.
LOWEST = -(2.0**30)

# The exponent of a visible key is at least this, however small its features
# are, so that a state with keys never looks empty.
LOWEST_SEEN = -(2.0**29)

# Rounding in float32 changes a query's exponent of this size by up to about
# 100. Below this size such an error cannot turn the query's largest feature,
# which is scaled to 2^QUERY_EXPONENT, into 0; from here on it may.
TOO_LARGE = 2.0**28

# Each key feature is scaled so that its largest value over the keys is about
# 2^KEY_EXPONENT, and each query so that its largest feature is about
# 2^QUERY_EXPONENT. Both are as far above underflow as sums over 2^20 keys and
# 2^8 features allow.
KEY_EXPONENT = 30.0
QUERY_EXPONENT = 40.0

# Query features below 2^-126 underflow to 0, and a key feature is at most 2^31.
# So products below 2^-95 may be lost, and a normalizer below 2^-95 may have
# lost its largest terms.
SMALLEST_NORMALIZER = 2.0**-95

# log(2) in two parts. The first has 16 bits, so that whole numbers times it are
# exact.
_LOG_2_HIGH = 0.693145751953125
_LOG_2_LOW = math.log(2.0) - _LOG_2_HIGH

# Half of log(2), and a little more for rounding.
_LIMIT = 0.501 * math.log(2.0)
_EXP_COEFFICIENTS = tuple(
  Chebyshev.interpolate(np.exp, 6, domain=[-_LIMIT, _LIMIT])
  .convert(kind=Polynomial)
  .coef.tolist()
)


def whole_exponent(log_magnitude: Array) -> Array:
  """Returns n where 2^n is the power nearest to ``exp(log_magnitude)``.

  No gradient flows through n. A larger `log_magnitude` never has a smaller n,
  so the largest exponent is that of the largest value.
  """
  log2 = jax.lax.stop_gradient(log_magnitude) * math.log2(math.e)
  return jnp.floor(log2 + 0.5)


def exp_near_zero(x: Array) -> Array:
  """Returns ``exp(x)`` for |x| <= log(2) / 2; it must not be differentiated.

  On a CPU it is a polynomial with error 3e-9 and half the cost of XLA's exp
  (docs/decisions/02-powers-of-two.md).
  """
  return jax.lax.platform_dependent(x, cpu=_polynomial, default=jnp.exp)


def _polynomial(x: Array) -> Array:
  """Interpolates exp at Chebyshev points."""
  out = jnp.full_like(x, _EXP_COEFFICIENTS[-1])
  for coefficient in _EXP_COEFFICIENTS[-2::-1]:
    out = out * x + coefficient
  return out


def split(
  log_magnitude: Array, exp: Callable[[Array], Array] = exp_near_zero
) -> tuple[Array, Array]:
  """Splits ``exp(log_magnitude)`` into a mantissa near 1 and a whole exponent.

  Args:
    log_magnitude: finite.
    exp: computes exp of numbers between -log(2) / 2 and log(2) / 2.
  """
  exponent = whole_exponent(log_magnitude)
  rest = log_magnitude - exponent * _LOG_2_HIGH - exponent * _LOG_2_LOW
  return exp(rest), exponent


def power_of_two(exponent: Array, largest: float = 127.0) -> Array:
  """Returns ``2 ** min(exponent, largest)`` exactly, and 0 below 2^-126."""
  biased = jnp.clip(exponent, -127.0, largest).astype(jnp.int32) + 127
  return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


def exponent_of(x: Array) -> Array:
  """Returns the whole n with 2^n <= |x| < 2^(n+1), in float32; -127 for 0."""
  bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  return ((bits >> 23) - 127).astype(jnp.float32)
