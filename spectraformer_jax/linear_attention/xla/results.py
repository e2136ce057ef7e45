"""What a pass returns for each query: a mean of values, or the sums alone."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import exponents
from spectraformer_jax.linear_attention.normalize import divide, normalize
from spectraformer_jax.typing import Array


class QuerySums(NamedTuple):
  """Sums over the keys that each query sees.

  Attributes:
    sums: sums of weights times values, and in the last column sums of weights,
      ``[B, N, (L,) G C, V + 1]``.
    magnitude: sums of absolute weights, ``[B, N, (L,) G C]``; None for positive
      maps.
  """

  sums: Array
  magnitude: Array | None


def mean(
  sums: QuerySums,
  needs_weight: Array | None,
  query_exponent: Array | None = None,
) -> tuple[Array, Array | None]:
  """Returns outputs ``[..., C, V]`` and, for positive maps, their normalizers.

  Both are NaN where `needs_weight` (from the function in `chunks`) is True but
  the weights have underflowed.
  """
  del query_exponent  # cancels in the mean
  numerator, normalizer = sums.sums[..., :-1], sums.sums[..., -1]
  out = normalize(numerator, normalizer, sums.magnitude)
  weight_sum = normalizer if sums.magnitude is None else sums.magnitude
  if needs_weight is not None:
    is_lost = needs_weight & (weight_sum < exponents.SMALLEST_NORMALIZER)
    out = jnp.where(is_lost[..., None], jnp.nan, out)
    normalizer = jnp.where(is_lost, jnp.nan, normalizer)
  return out, normalizer if sums.magnitude is None else None


def mean_vjp(
  sums: QuerySums,
  needs_weight: Array | None,
  out: Array,
  normalizer: Array | None,
  d_out: Array,
) -> QuerySums:
  """Returns the gradient of the sums, given that of the outputs of `mean`.

  For positive maps it reads only the results of `mean`, so that XLA does not
  compute the sums again.
  """
  shape = (*sums.sums.shape[:-1], -1)
  out, d_out = out.reshape(shape), d_out.reshape(shape)
  if normalizer is None:
    return jax.vjp(lambda sums: mean(sums, needs_weight)[0], sums)[1](d_out)[0]
  return QuerySums(divisor_vjp(out, normalizer[..., None], d_out), None)


def sums_and_exponent(
  sums: QuerySums, needs_weight: Array | None, query_exponent: Array | None
) -> tuple[Array, None]:
  """Returns the sums as columns, and last the exponent of their scale.

  The columns are numerators, the normalizer, for signed maps the magnitude,
  and n: the true sums are the columns before it times 2^n. The normalizer is
  NaN where `needs_weight` is True but the weights have underflowed.

  Args:
    sums: see `QuerySums`.
    needs_weight: see `mean`.
    query_exponent: exponent of each query's features, ``[..., C, 1]``.
  """
  assert query_exponent is not None  # given for log-features
  numerator, normalizer = sums.sums[..., :-1], sums.sums[..., -1:]
  magnitude = sums.magnitude
  columns = [] if magnitude is None else [magnitude[..., None]]
  weight_sum = columns[0] if columns else normalizer
  if needs_weight is not None:
    is_lost = needs_weight[..., None] & (
      weight_sum < exponents.SMALLEST_NORMALIZER
    )
    normalizer = jnp.where(is_lost, jnp.nan, normalizer)
  scale = exponents.KEY_EXPONENT + exponents.QUERY_EXPONENT
  columns = [numerator, normalizer, *columns, query_exponent - scale]
  return jnp.concatenate(columns, axis=-1), None


def sums_vjp(
  sums: QuerySums,
  needs_weight: Array | None,
  out: Array,
  normalizer: Array | None,
  d_out: Array,
) -> QuerySums:
  """Returns the gradient of sums that are one part of a mean.

  Args:
    sums: of this part.
    needs_weight: not used.
    out: the mean over all parts, ``[..., V]``.
    normalizer: the divisor of the mean, in the units of `sums`, ``[..., C]``.
    d_out: the gradient of `out`.
  """
  del needs_weight
  shape = (*sums.sums.shape[:-1], -1)
  assert normalizer is not None
  d_sums = divisor_vjp(
    out.reshape(shape), normalizer.reshape(shape), d_out.reshape(shape)
  )
  magnitude = sums.magnitude
  return QuerySums(
    d_sums, None if magnitude is None else jnp.zeros_like(magnitude)
  )


def divisor_vjp(out: Array, divisor: Array, d_out: Array) -> Array:
  """Returns the gradient of ``[numerator, divisor]``, given the quotient's.

  Args:
    out: the quotient, ``[..., V]``.
    divisor: ``[..., 1]``; where it is 0 the gradient is 0.
    d_out: the gradient of `out`.

  Returns:
    ``[..., V + 1]``.
  """
  d_numerator = divide(d_out, divisor)
  d_divisor = -jnp.sum(d_numerator * out, axis=-1, keepdims=True)
  return jnp.concatenate([d_numerator, d_divisor], axis=-1)


class Result(NamedTuple):
  """What a pass returns for each query; static.

  Attributes:
    forward: takes the sums over a query's keys, the result of `needs_weight`,
      and the exponent of the query's features; returns the output and, for the
      backward pass, a normalizer or None.
    backward: takes the sums, the result of `needs_weight`, output, normalizer
      and the gradient of the output; returns the gradient of the sums.
    is_mean: whether the output is ``[..., V]`` of value's dtype; else it has
      the float32 columns of `sums_and_exponent`.
  """

  forward: Callable[
    [QuerySums, Array | None, Array | None], tuple[Array, Array | None]
  ]
  backward: Callable[
    [QuerySums, Array | None, Array, Array | None, Array], QuerySums
  ]
  is_mean: bool

  def depth(self, value_dim: int, *, is_signed: bool) -> int:
    """Returns the size of the last axis of the output."""
    return value_dim if self.is_mean else value_dim + 2 + is_signed


MEAN = Result(mean, mean_vjp, is_mean=True)
SUMS = Result(sums_and_exponent, sums_vjp, is_mean=False)
