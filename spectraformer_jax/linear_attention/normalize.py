"""Division of a query's sums by its normalizer."""

import jax.numpy as jnp

from spectraformer_jax.linear_attention.exponents import (
  exponent_of,
  power_of_two,
)
from spectraformer_jax.typing import Array

# The absolute value of a signed normalizer is raised to at least this fraction
# of the sum of absolute weights: about what rounding in float32 leaves of a
# normalizer that should be zero.
SIGNED_FLOOR = 1e-6


def normalize(
  numerator: Array, normalizer: Array, magnitude: Array | None
) -> Array:
  """Returns ``numerator / normalizer``, and zeros where no key is seen.

  Args:
    numerator: sums of weights times values, ``[..., V]``.
    normalizer: sums of weights, ``[...]``.
    magnitude: sums of absolute weights ``[...]`` for signed maps, to keep the
      normalizer away from zero; None for positive maps.
  """
  if magnitude is not None:
    sign = jnp.where(normalizer < 0.0, -1.0, 1.0)
    normalizer = sign * jnp.maximum(
      jnp.abs(normalizer), SIGNED_FLOOR * magnitude
    )
  return divide(numerator, normalizer[..., None])


def divide(numerator: Array, normalizer: Array) -> Array:
  """Returns ``numerator [..., V] / normalizer [..., 1]``, and zeros for 0 / 0.

  The normalizer is scaled to between 1 and 2 first, because the gradient
  divides by its square, which could leave the range of float32.
  """
  sees_keys = normalizer != 0.0
  factor = power_of_two(-exponent_of(normalizer))
  normalizer = jnp.where(sees_keys, normalizer * factor, 1.0)
  return jnp.where(sees_keys, (numerator * factor) / normalizer, 0.0)
