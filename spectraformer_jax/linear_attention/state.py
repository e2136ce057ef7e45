"""The state of linear attention, and features as mantissa times power of two.

Sums over keys are kept relative to a power of two per feature, the largest
exponent seen so far. Powers of two cancel without rounding, so results do not
depend on which keys set the exponent: not on later ones, not on how a sequence
was split. (Only what is 2^150 times smaller than the largest is lost.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from spectraformer_jax.linear_attention.layouts import in_columns, once
from spectraformer_jax.typing import Array, LogFeatures, PyTree

# (constants, x [B, N, C, H], position of the first) -> features [B, N, C, F]; a
# log_magnitude of None stands for features without exponent.
FeatureFn = Callable[[PyTree, Array, Array], LogFeatures]


# The exponent before any key: below every real one, and exact in float32.
LOWEST = -(2.0**30)

# The least of a key that is seen. What is below is out of range, which must not
# look as if no key were seen.
LOWEST_SEEN = -(2.0**29)

# Exponents as large, of queries and keys together, are not exact in float32.
TOO_LARGE = 2.0**28

# A query feature below 2^-126 is lost, and with it what it would take from a
# key feature, which is 2^31 at most: a normalizer below this may be nothing but
# what such losses have left.
SMALLEST_NORMALIZER = 2.0**-95

# Sizes of the largest key and query feature, as exponents: as far from
# underflow as sums over 2^20 keys and 2^8 features leave room for.
KEY_EXPONENT = 30.0
QUERY_EXPONENT = 40.0

# A signed normalizer is kept this far from zero, relative to the same sum of
# magnitudes: what float32 sums leave of a value that should be zero.
SIGNED_FLOOR = 1e-6

_LOG_2_HIGH = 0.693145751953125
_LOG_2_LOW = math.log(2.0) - _LOG_2_HIGH

_LIMIT = 0.501 * math.log(2.0)
_EXP_COEFFICIENTS = tuple(
  Chebyshev.interpolate(np.exp, 6, domain=[-_LIMIT, _LIMIT])
  .convert(kind=Polynomial)
  .coef.tolist()
)


class Maps(NamedTuple):
  """The feature maps of the two sides; static."""

  query: FeatureFn
  key: FeatureFn


class State(NamedTuple):
  """Sums over the keys seen so far; float32, its size does not grow.

  Attributes:
    kv: sum of key features times values, ``[B, N, F, V]``.
    total: sum of key features, ``[B, N, F]``.
    magnitude: sum of absolute key features, ``[B, N, F]``, for signed maps;
      None for positive ones.
    exponent: the power of two divided out, ``[B, N, F]`` or ``[B, N, 1]``.
    length: positions seen so far, int32 scalar.
    segment: id of the packed row that the sums belong to, ``[B]``, or None.
    rest: what rounding left out of `kv` and, in the last column, of `total`,
      ``[B, N, F, V + 1]``: decoding adds it to the next token, since a million
      roundings may all go one way. None: it is dropped.
  """

  kv: Array
  total: Array
  magnitude: Array | None
  exponent: Array
  length: Array
  segment: Array | None = None
  rest: Array | None = None


def whole_exponent(log_magnitude: Array) -> Array:
  """The whole power of two next to ``exp(log_magnitude)``; no gradient.

  It does not decrease, so the largest exponent is that of the largest value.
  """
  bits = jax.lax.stop_gradient(log_magnitude) * math.log2(math.e)
  return jnp.floor(bits + 0.5)


def exp_near_zero(x: Array) -> Array:
  """``exp(x)`` for |x| <= log(2) / 2, not to be differentiated.

  On a CPU a polynomial with error 3e-9, half as dear as XLA's exp there.
  """
  return jax.lax.platform_dependent(x, cpu=_polynomial, default=jnp.exp)


def _polynomial(x: Array) -> Array:
  """Interpolates exp at Chebyshev's points."""
  out = jnp.full_like(x, _EXP_COEFFICIENTS[-1])
  for coefficient in _EXP_COEFFICIENTS[-2::-1]:
    out = out * x + coefficient
  return out


def split(
  log_magnitude: Array, exp: Callable[[Array], Array] = exp_near_zero
) -> tuple[Array, Array]:
  """``exp(log_magnitude)`` as a mantissa near 1 and a whole exponent.

  Args:
    log_magnitude: finite.
    exp: of numbers between -log(2) / 2 and log(2) / 2.
  """
  exponent = whole_exponent(log_magnitude)
  # In two parts, the first of 16 bits, so that its product is exact.
  rest = log_magnitude - exponent * _LOG_2_HIGH - exponent * _LOG_2_LOW
  return exp(rest), exponent


def power_of_two(exponent: Array, largest: float = 127.0) -> Array:
  """2 to a whole power, at most `largest`, exactly; 0 below 2^-126."""
  biased = jnp.clip(exponent, -127.0, largest).astype(jnp.int32) + 127
  return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


def exponent_of(x: Array) -> Array:
  """The whole n with 2^n <= |x| < 2^(n+1), as float32; -127 for 0."""
  bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  return ((bits >> 23) - 127).astype(jnp.float32)


@jax.custom_jvp
def exponential_of(log_magnitude: Array, features: Array) -> Array:
  """The features, made without gradient, with themselves as derivative.

  Said so, the backward pass reads them; XLA would compute them again.
  """
  del log_magnitude
  return once(features)


@exponential_of.defjvp
def _exponential_of_jvp(primals, tangents):
  out = exponential_of(*primals)
  return out, out * tangents[0]


def key_features(
  key_map: FeatureFn,
  constants: PyTree,
  key: Array,
  position: Array,
  keep: Array | None,
  exponent: Array,
  is_final: bool = False,
  segment: Array | None = None,
  *,
  exponential: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
  """Features ``[B, N, S, C, F]`` of keys, relative to the returned exponent.

  Args:
    key_map: the feature map of keys.
    constants: its variables.
    key: ``[B, N, S, C, H]``: S chunks.
    position: of the first key of each chunk, ``[S]``.
    keep: bool ``[B, 1, S, C, 1]``, False for hidden keys; None for all True.
    exponent: the state's; the result is at least this.
    is_final: no visible key has a larger exponent: it need not be looked for.
    segment: ids ``[B, C]`` of packed rows (not decreasing) in one chunk; the
      state is of the first. Each has exponents of its own then, and what is
      returned are those of each position, ``[B, N, C, F]`` or ``[.., 1]``.
    exponential: see `Products`.
  """
  log_magnitude, factor = _of_chunks(key_map, constants, key, position)
  if segment is not None:
    is_first = (segment == segment[:, :1])[:, None, :, None]
    exponent = jnp.where(is_first, exponent[:, :, None], LOWEST)
  if log_magnitude is None:
    features = factor
  else:
    fixed = jax.lax.stop_gradient(log_magnitude)
    features, own = split(log_magnitude)
    if not is_final:
      hidden = jnp.finfo(fixed.dtype).min
      visible = fixed if keep is None else jnp.where(keep, fixed, hidden)
      if segment is None:
        largest = jnp.max(visible, axis=(2, 3))
      else:
        largest = max_in_segments(visible[:, :, 0], segment)
      largest = jnp.where(
        largest <= hidden, LOWEST, jnp.maximum(largest, LOWEST_SEEN)
      )
      exponent = once(jnp.maximum(exponent, whole_exponent(largest)))
    of_keys = exponent[:, :, None]
    if segment is None:
      of_keys = of_keys[:, :, None]
    below = jnp.minimum(own - of_keys, 0.0)
    features = features * power_of_two(below + KEY_EXPONENT)
    features = exponential(log_magnitude, features)
    if factor is not None:
      features = features * factor
  if keep is not None:
    features = jnp.where(keep, features, 0.0)
  return features, exponent


def max_in_segments(x: Array, segment: Array) -> Array:
  """The largest of ``x [B, N, C, F]`` in the segment of each position.

  Args:
    x: numbers.
    segment: ids ``[B, C]``, not decreasing.
  """
  length = x.shape[2]
  for side in (1, -1):
    distance = 1
    while distance < length:
      # Equal ids so far apart have only equal ones between.
      moved = jnp.roll(segment, side * distance, axis=1)
      place = jnp.arange(length)[::side]
      same = (moved == segment) & (place >= distance)[None]
      other = jnp.roll(x, side * distance, axis=2)
      x = jnp.where(same[:, None, :, None], jnp.maximum(x, other), x)
      distance *= 2
  return x


def query_features(
  query_map: FeatureFn,
  constants: PyTree,
  query: Array,
  position: Array,
  exponent: Array,
  top: Array | None = None,
  *,
  exponential: Callable[[Array, Array], Array],
) -> tuple[Array, Array | None, bool]:
  """Features of queries ``[B, N, S, G, C, H]`` for sums of that exponent.

  They take back the keys' exponents, and then each query's largest one, which
  cancels when the output is normalized.

  Args:
    query_map: the feature map of queries.
    constants: its variables.
    query: ``[B, N, S, G, C, H]``: S chunks, G queries of each key head.
    position: of the first query of each chunk, ``[S]``.
    exponent: of the sums, ``[B, N, F]``, or of those that each query sees,
      ``[B, N, S, G C, F]``; F may be 1.
    top: the largest exponents, where they are known.
    exponential: see `Products`.

  Returns:
    ``[B, N, S, G C, F]``, the groups one after another; the largest exponents
    ``[B, N, S, G C, 1]``, None for features without; and whether features are
    exponentials alone, so that none is zero.
  """
  batch, heads, count, groups, _, head_dim = query.shape
  queries = query.reshape(batch, heads, count * groups, -1, head_dim)
  position = jnp.repeat(position, groups)
  log_magnitude, factor = jax.tree.map(
    lambda x: x.reshape(batch, heads, count, -1, x.shape[-1]),
    _of_chunks(query_map, constants, queries, position),
  )
  if log_magnitude is None:
    return factor, None, False
  fixed = jax.lax.stop_gradient(log_magnitude)
  features, own = split(log_magnitude)
  if exponent.ndim == 3:
    exponent = exponent[:, :, None, None]
  if top is None:
    whole = fixed + exponent * math.log(2.0)
    top = once(whole_exponent(jnp.max(whole, axis=-1, keepdims=True)))
  # Exponents before any key are too low to be subtracted exactly.
  scale = own + exponent - top + QUERY_EXPONENT
  features = features * power_of_two(scale, QUERY_EXPONENT + 8.0)
  features = exponential(log_magnitude, features)
  if factor is None:
    return features, top, True
  return features * factor, top, False


def _of_chunks(feature_map, constants, x, position) -> LogFeatures:
  """Features ``[B, N, S, C, F]`` of ``[B, N, S, C, H]``, positions ``[S]``."""
  if x.shape[2] == 1:
    # For an axis of size 1 XLA for CPUs lays out products worse.
    out = feature_map(constants, x[:, :, 0], position[0])
    log_magnitude, factor = jax.tree.map(lambda leaf: leaf[:, :, None], out)
  else:
    of_chunks = jax.vmap(feature_map, in_axes=(None, 2, 0), out_axes=2)
    log_magnitude, factor = of_chunks(constants, x, position)
  if log_magnitude is not None:
    log_magnitude = in_columns(log_magnitude)
  return LogFeatures(log_magnitude, factor)


def rescale(state: State, exponent: Array) -> State:
  """The same sums, relative to a larger exponent."""
  factor = power_of_two(state.exponent - exponent)
  return state._replace(
    kv=state.kv * factor[..., None],
    total=None if state.total is None else state.total * factor,
    magnitude=None if state.magnitude is None else state.magnitude * factor,
    exponent=exponent,
    rest=None if state.rest is None else state.rest * factor[..., None],
  )


def with_rest(state: State) -> State:
  """The state, with sums from which rounding has left out nothing yet."""
  kv = state.kv
  return state._replace(
    rest=jnp.zeros_like(kv, shape=(*kv.shape[:-1], kv.shape[-1] + 1))
  )


def add_exactly(total: Array, part: Array, rest: Array) -> tuple[Array, Array]:
  """``total + part + rest`` rounded, and what rounding leaves out of it."""
  part = part + rest
  # Made once, as the difference is to be that of what was rounded.
  new = jax.lax.optimization_barrier(total + part)
  return new, jax.lax.stop_gradient(part - (new - total))


def fixed(state: State) -> State:
  """The same state with gradients for its sums alone, which go by the rest."""
  exponent, rest = jax.lax.stop_gradient((state.exponent, state.rest))
  return state._replace(exponent=exponent, rest=rest)


def joined(state: State) -> State:
  """The same sums as chunks take them: `total` is the last column of `kv`.

  One product with the features then makes both, or reads both.
  """
  kv = jnp.concatenate([state.kv, state.total[..., None]], axis=-1)
  return state._replace(kv=kv, total=None)


def parted(state: State) -> State:
  """Undoes `joined`."""
  return state._replace(kv=state.kv[..., :-1], total=state.kv[..., -1])


def normalise(
  numerator: Array, normalizer: Array, magnitude: Array | None
) -> Array:
  """``numerator [..., V] / normalizer [...]``; zeros where no key is seen."""
  return divide(numerator, guarded(normalizer, magnitude)[..., None])


def guarded(normalizer: Array, magnitude: Array | None) -> Array:
  """A signed normalizer kept off zero; a positive one as it is.

  It is at least `SIGNED_FLOOR` of the sum of magnitudes, with its sign (+ for
  0).
  """
  if magnitude is None:
    return normalizer
  sign = jnp.where(normalizer < 0.0, -1.0, 1.0)
  return sign * jnp.maximum(jnp.abs(normalizer), SIGNED_FLOOR * magnitude)


def divide(numerator: Array, normalizer: Array) -> Array:
  """``numerator [..., V] / normalizer [..., 1]``; zeros where that is 0."""
  sees_keys = normalizer != 0.0
  # Brought near 1 first: the gradient squares what it divides by.
  factor = power_of_two(-exponent_of(normalizer))
  normalizer = jnp.where(sees_keys, normalizer * factor, 1.0)
  return jnp.where(sees_keys, (numerator * factor) / normalizer, 0.0)


def empty_state(
  batch: int,
  heads: int,
  feature_dim: int,
  value_dim: int,
  *,
  exponent_dim: int,
  is_signed: bool,
) -> State:
  """The state before any key."""
  sums = jnp.zeros((batch, heads, feature_dim), jnp.float32)
  return State(
    kv=jnp.zeros((batch, heads, feature_dim, value_dim), jnp.float32),
    total=sums,
    magnitude=sums if is_signed else None,
    exponent=jnp.full((batch, heads, exponent_dim), LOWEST, jnp.float32),
    length=jnp.zeros((), jnp.int32),
  )
