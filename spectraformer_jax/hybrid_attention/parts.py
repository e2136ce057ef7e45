r"""Sums over disjoint sets of keys, and the quotient of their total.

.. math::
  o_i = \frac{\sum_{j \in X} K_{ij} v_j + \sum_{j \in R} \hat K_{ij} v_j}
    {\sum_{j \in X} K_{ij} + \sum_{j \in R} \hat K_{ij}}

with the exact keys X and all others, R. Each sum is kept relative to a power of
two of its own, so parts of very different size add without overflow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.exponents import (
  LOWEST,
  exponent_of,
  power_of_two,
)
from spectraformer_jax.linear_attention.normalize import SIGNED_FLOOR, divide
from spectraformer_jax.typing import Array

# A signed far sum is dropped if an exact key is visible and the sum is at most
# NOISE / sqrt(M) times the sum of its absolute weights. So small a sum is
# mostly noise, and so is its numerator.
NOISE = 0.8

# Far weights that have underflowed add up to less than 2^-75 in the units of
# their pass. Beside a total of 2^LARGEST_LOST they are less than its rounding.
LARGEST_LOST = -50.0


class Part(NamedTuple):
  """Sums over some keys, times 2^-exponent.

  Attributes:
    sums: numerators, and in the last column the sum of weights,
      ``[..., V + 1]``.
    magnitude: sum of absolute weights, ``[..., 1]``; None if no weight is
      negative.
    exponent: a whole number without gradient, ``[..., 1]``.
  """

  sums: Array
  magnitude: Array | None
  exponent: Array


class Quotient(NamedTuple):
  """The result of `divide_parts`.

  Attributes:
    out: ``[..., V]``.
    divisor: its divisor, times 2^-exponent, ``[..., 1]``.
    exponent: ``[..., 1]``.
    keeps_far: bool ``[..., 1]``: whether the far part is in `out`.
    is_floored: bool ``[..., 1]``: whether the divisor was too small and was
      replaced; it has no gradient then.
  """

  out: Array
  divisor: Array
  exponent: Array
  keeps_far: Array
  is_floored: Array

  def divisor_of(self, exponent: Array) -> Array:
    """Returns the divisor relative to the exponent of another part."""
    return self.divisor * power_of_two(self.exponent - exponent, 120.0)


def far_part(columns: Array, value_dim: int) -> Part:
  """Returns the part of a pass, from its columns; see `sums_and_exponent`."""
  sums, rest = jnp.split(columns, [value_dim + 1], axis=-1)
  is_signed = rest.shape[-1] == 2
  exponent = jax.lax.stop_gradient(rest[..., -1:])
  return Part(sums, rest[..., :1] if is_signed else None, exponent)


def add(first: Part, *others: Part) -> Part:
  """Returns the sum of parts that all have a magnitude, or all have none."""
  total = _normalized(first)
  for part in map(_normalized, others):
    exponent = jnp.maximum(total.exponent, part.exponent)
    total, part = _rescaled(total, exponent), _rescaled(part, exponent)
    magnitude = total.magnitude
    if magnitude is not None and part.magnitude is not None:
      magnitude += part.magnitude
    total = Part(total.sums + part.sums, magnitude, exponent)
  return total


def divide_parts(exact: Part, passes: list[Part], num_rows: int) -> Quotient:
  """Returns the quotient of all parts together.

  It is NaN where the weights of a pass have underflowed (their sum is NaN) and
  may matter beside the other parts.

  Args:
    exact: positive weights.
    passes: estimated weights of disjoint sets of keys.
    num_rows: M, which says how noisy a far part with negative weights is.
  """
  far = add(*map(_without_lost, passes))
  keeps_far = jnp.ones(far.exponent.shape, bool)
  if far.magnitude is not None:
    sees_exact = exact.sums[..., -1:] > 0.0
    is_noise = far.sums[..., -1:] <= NOISE / num_rows**0.5 * far.magnitude
    keeps_far = ~(sees_exact & is_noise)
    exact = exact._replace(magnitude=exact.sums[..., -1:])
  far = Part(
    jnp.where(keeps_far, far.sums, 0.0),
    None if far.magnitude is None else jnp.where(keeps_far, far.magnitude, 0.0),
    far.exponent,
  )
  sums, magnitude, exponent = add(exact, far)
  divisor, is_floored = sums[..., -1:], jnp.zeros_like(keeps_far)
  if magnitude is not None:
    floor = jax.lax.stop_gradient(SIGNED_FLOOR * magnitude)
    is_floored = jnp.abs(divisor) < floor
    sign = jnp.where(divisor < 0.0, -1.0, 1.0)
    divisor = jnp.where(is_floored, sign * floor, divisor)
  size = exponent + exponent_of(divisor if magnitude is None else magnitude)
  for part in passes:
    is_negligible = part.exponent + LARGEST_LOST <= size
    is_unknown = jnp.isnan(part.sums[..., -1:]) & ~is_negligible
    divisor = jnp.where(is_unknown, jnp.nan, divisor)
  return Quotient(
    divide(sums[..., :-1], divisor), divisor, exponent, keeps_far, is_floored
  )


def _rescaled(part: Part, exponent: Array) -> Part:
  """Returns the same sums, relative to a larger exponent."""
  factor = power_of_two(part.exponent - exponent)
  magnitude = part.magnitude
  return Part(
    part.sums * factor,
    None if magnitude is None else magnitude * factor,
    exponent,
  )


def _without_lost(part: Part) -> Part:
  """Returns the part, without weights that have underflowed."""
  is_lost = jnp.isnan(part.sums[..., -1:])
  magnitude = part.magnitude
  return Part(
    jnp.where(is_lost, 0.0, part.sums),
    None if magnitude is None else jnp.where(is_lost, 0.0, magnitude),
    part.exponent,
  )


def _normalized(part: Part) -> Part:
  """Returns the part with a sum of (absolute) weights between 1 and 2."""
  sums, magnitude, exponent = part
  weight_sum = sums[..., -1:] if magnitude is None else magnitude
  weight_sum = jax.lax.stop_gradient(weight_sum)
  own = exponent_of(weight_sum)
  factor = power_of_two(-own)
  is_empty = weight_sum == 0.0
  return Part(
    jnp.where(is_empty, 0.0, sums * factor),
    None if magnitude is None else magnitude * factor,
    jnp.where(is_empty, LOWEST, exponent + own),
  )
