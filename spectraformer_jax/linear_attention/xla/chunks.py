"""What happens inside one chunk of keys and queries.

States are `joined` here: the last column of their ``kv [B, N, F, V + 1]`` is
the sum of key features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.layouts import in_columns
from spectraformer_jax.linear_attention.state import (
  LOWEST,
  SMALLEST_NORMALIZER,
  TOO_LARGE,
  FeatureFn,
  State,
  add_exactly,
  key_features,
  normalise,
  query_features,
  rescale,
)
from spectraformer_jax.linear_attention.xla.products import Products
from spectraformer_jax.typing import Array, PyTree


class Found(NamedTuple):
  """What the queries of a chunk have found.

  Attributes:
    out: means of values, ``[B, N, G, C, V]``.
    normalizer: what they were divided by, ``[B, N, (S,) G C]``; None for
      signed maps.
    top: largest exponents, see `query_features`.
  """

  out: Array
  normalizer: Array | None
  top: Array | None


def add_keys(
  key_map: FeatureFn,
  constants: PyTree,
  state: State,
  key: Array,
  value: Array,
  position: Array,
  keep: Array | None,
  products: Products,
  is_final: bool = False,
) -> State:
  """The state after the keys of one block.

  Args:
    key_map: the feature map of keys.
    constants: its variables.
    state: before the block.
    key: ``[B, N, C, H]``.
    value: ``[B, N, C, V]``.
    position: of the first key.
    keep: bool ``[B, 1, C, 1]`` or None.
    products: see `Products`.
    is_final: the state has the exponent of all keys already.
  """
  psi, exponent = key_features(
    key_map,
    constants,
    _in_chunks(key, 1),
    position[None],
    _in_chunks(keep, 1),
    state.exponent,
    is_final,
    exponential=products.exponential,
  )
  state = rescale(state, exponent)
  return _add(state, psi[:, :, 0], _with_ones(value), products)


def read(
  query_map: FeatureFn,
  constants: PyTree,
  state: State,
  query: Array,
  position: Array,
  products: Products,
  known: Found | None = None,
) -> Found:
  """Queries ``[B, N, G, C, H]`` see the state.

  With `known`, the result, gradients alone are worked out.
  """
  phi, top, is_exponential = query_features(
    query_map,
    constants,
    query[:, :, None],
    position[None],
    state.exponent,
    known and known.top,
    exponential=products.exponential,
  )
  phi = phi[:, :, 0]
  sums = products.queries_times_state(phi, state.kv)
  magnitude = _times_magnitude(phi, state)
  if known is not None:
    known = known._replace(out=known.out.reshape(*sums.shape[:-1], -1))
  sees_keys = _has_keys(state)
  is_zero = None
  if not is_exponential:
    is_zero = _is_zero(phi, None if top is None else top[:, :, 0])
  out, normalizer = _mean(sums, magnitude, known, products, sees_keys, is_zero)
  return Found(out.reshape(*query.shape[:-1], -1), normalizer, top)


def causal_chunks(
  query_map: FeatureFn,
  key_map: FeatureFn,
  chunk: int,
  constants: PyTree,
  state: State,
  query: Array,
  key: Array,
  value: Array,
  position: Array,
  keep: Array | None,
  segment: Array | None,
  products: Products,
  known: Found | None = None,
) -> tuple[State, Found]:
  """Outputs of some chunks whose queries see the state and earlier keys.

  Args:
    query_map: the feature map of queries.
    key_map: that of keys.
    chunk: positions of a chunk; it divides C.
    constants: their variables.
    state: sums over the keys before the first.
    query: ``[B, N, G, C, H]``.
    key: ``[B, N, C, H]``.
    value: ``[B, N, C, V]``.
    position: of the first.
    keep: bool ``[B, 1, C, 1]`` or None.
    segment: ids ``[B, C]`` of packed rows (not decreasing) in one chunk, or
      None.
    products: see `Products`.
    known: what was found, where gradients alone are wanted; else None.

  Returns:
    The state after them, and what their queries found.
  """
  groups, count = query.shape[2], query.shape[3] // chunk
  positions = position + chunk * jnp.arange(count)
  if segment is not None:
    state = _seen_by(state, segment[:, 0])
  psi, exponent = key_features(
    key_map,
    constants,
    _in_chunks(key, count),
    positions,
    _in_chunks(keep, count),
    state.exponent,
    segment=segment,
    exponential=products.exponential,
  )
  first = last = of_queries = exponent
  if segment is not None:
    first, last = exponent[:, :, 0], exponent[:, :, -1]
    of_queries = jnp.tile(exponent, (1, 1, groups, 1))[:, :, None]
  before = rescale(state, first)
  phi, top, is_exponential = query_features(
    query_map,
    constants,
    _chunks_first(query, count),
    positions,
    of_queries,
    known and known.top,
    exponential=products.exponential,
  )
  visible = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None, None]
  if segment is not None:
    visible &= (segment[:, :, None] == segment[:, None, :])[:, None, None]
  visible = jnp.tile(visible, (1, 1, 1, groups, 1))

  def within(phi, psi):
    weights = jnp.einsum("...cf,...df->...cd", phi, psi)
    return jnp.where(visible, weights, 0.0)

  value = _in_chunks(_with_ones(value), count)
  states, after = _states(before, psi, value, products)
  sums = products.queries_times_state(phi, states.kv)
  magnitude = _times_magnitude(phi, states)
  if segment is not None:
    old = jnp.tile(segment == segment[:, :1], (1, groups))
    old = old[:, None, None]
    sums = jnp.where(old[..., None], sums, 0.0)
    if magnitude is not None:
      magnitude = jnp.where(old, magnitude, 0.0)
    before = rescale(_seen_by(before, segment[:, -1]), last)
    is_last = (segment == segment[:, -1:])[:, None, :, None]
    own = jnp.where(is_last, psi[:, :, 0], 0.0)
    after = _add(before, own, value[:, :, 0], products)
  sums += jnp.einsum("...cd,...dv->...cv", within(phi, psi), value)
  if magnitude is not None:
    magnitude += jnp.sum(within(jnp.abs(phi), jnp.abs(psi)), axis=-1)
  if known is not None:
    found = _chunks_first(known.out, count)
    known = known._replace(out=found.reshape(*sums.shape[:-1], -1))
  sees_keys = _has_keys(state)[:, :, None]
  sees_keys |= _sees_new_keys(keep, segment, count, groups)
  is_zero = None if is_exponential else _is_zero(phi, top)
  out, normalizer = _mean(sums, magnitude, known, products, sees_keys, is_zero)
  out = out.reshape(*out.shape[:3], groups, chunk, -1)
  out = jnp.swapaxes(out, 2, 3).reshape(*query.shape[:-1], -1)
  return after, Found(out, normalizer, top)


def unless_unused(
  query: Array, known: Found, d_out: Array, count: int = 1
) -> tuple[Array, Found]:
  """Zeros for queries whose outputs nobody uses: they may hold anything.

  Padding is among them. A zero gradient of the output is not enough, since a
  product of zero with what NaN or 1e30 makes of a feature is NaN.

  Args:
    query: ``[B, N, G, C, H]``.
    known: what was found, for them.
    d_out: the gradient of their outputs, ``[B, N, G, C, V]``.
    count: of the chunks that they are of, S.
  """
  unused = jnp.all(d_out == 0.0, axis=-1, keepdims=True)
  out = jnp.where(unused, 0, known.out)
  normalizer, top = known.normalizer, known.top
  rows = _chunks_first(unused, count)
  rows = rows.reshape(*rows.shape[:3], -1, 1)
  if normalizer is not None:
    normalizer = jnp.where(rows.reshape(normalizer.shape), 1.0, normalizer)
  if top is not None:
    # So large a divisor leaves nothing of their features.
    top = jnp.where(rows, -LOWEST, top)
  return jnp.where(unused, 0, query), Found(out, normalizer, top)


def _in_chunks(x: Array | None, count: int) -> Array | None:
  """``[B, N, S C, .] -> [B, N, S, C, .]``, S the count of chunks."""
  if x is None:
    return None
  return x.reshape(*x.shape[:2], count, -1, x.shape[-1])


def _chunks_first(x: Array, count: int) -> Array:
  """``[B, N, G, S C, .] -> [B, N, S, G, C, .]``, S the count of chunks."""
  x = x.reshape(*x.shape[:3], count, -1, x.shape[-1])
  return jnp.swapaxes(x, 2, 3)


def _states(
  state: State, psi: Array, value: Array, products: Products
) -> tuple[State, State]:
  """States before each chunk, ``[B, N, S, ...]``, and after the last."""
  own = products.keys_times_values(psi, value)
  kv, last_kv = _running(state.kv, own)
  rest = state.rest
  if rest is not None:
    last_kv, rest = add_exactly(state.kv, jnp.sum(own, axis=2), rest)
  magnitude = last_magnitude = None
  if state.magnitude is not None:
    magnitude, last_magnitude = _running(
      state.magnitude, jnp.sum(jnp.abs(psi), axis=-2)
    )
  return (
    state._replace(kv=kv, magnitude=magnitude),
    state._replace(kv=last_kv, magnitude=last_magnitude, rest=rest),
  )


def _running(first: Array, own: Array) -> tuple[Array, Array]:
  """Sums before each chunk, ``[B, N, S, ...]``, and after the last.

  XLA for CPUs makes a cumulative sum of S chunks by S^2 / 2 additions.
  """
  if own.shape[2] == 1:
    return first[:, :, None], first + own[:, :, 0]
  return jax.lax.platform_dependent(
    first, own, cpu=_running_one_by_one, default=_running_at_once
  )


def _running_one_by_one(first, own):
  add = lambda total, part: (total + part, total)
  own = jnp.moveaxis(own, 2, 0)
  last, before = jax.lax.scan(add, first, own, unroll=16)
  return jnp.moveaxis(before, 0, 2), last


def _running_at_once(first, own):
  first = first[:, :, None]
  ends = first + jnp.cumsum(own, axis=2)
  return jnp.concatenate([first, ends[:, :, :-1]], axis=2), ends[:, :, -1]


def _with_ones(value: Array) -> Array:
  """``[..., C, V] -> [..., C, V + 1]``: what the sum of keys is a sum of."""
  value = in_columns(value.astype(jnp.float32))
  return jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)


def _has_keys(state: State) -> Array:
  """Whether keys were seen, bool ``[B, N, 1]``; False without exponents."""
  return jnp.any(state.exponent > LOWEST, axis=-1, keepdims=True)


def _sees_new_keys(
  keep: Array | None, segment: Array | None, count: int, groups: int
) -> Array:
  """Whether queries of chunks see keys of these, bool ``[B, 1, S, G C]``."""
  if keep is None:
    return jnp.ones((1, 1, 1, 1), bool)
  visible = keep[..., 0]
  if segment is None:
    place = jnp.arange(visible.shape[-1])[None, None]
    first = jnp.argmax(visible, axis=-1, keepdims=True)
    visible = jnp.any(visible, axis=-1, keepdims=True) & (place >= first)
  visible = visible.reshape(*visible.shape[:2], count, -1)
  return jnp.tile(visible, (1, 1, 1, groups))


def _is_zero(phi: Array, top: Array | None) -> Array:
  """Whether all features of a query are 0, and not for their exponents."""
  is_zero = jnp.all(phi == 0.0, axis=-1)
  return is_zero if top is None else is_zero & (top[..., 0] < TOO_LARGE)


def _mean(
  sums: Array,
  magnitude: Array | None,
  known: Found | None,
  products: Products,
  sees_keys: Array,
  is_zero: Array | None,
):
  """Outputs ``[..., C, V]`` and, of positive maps, the normalizers.

  Both are NaN where keys are seen of whose weights nothing reliable is left.

  Args:
    sums: of weights times values, and of weights.
    magnitude: sums of the weights' magnitudes, for signed maps.
    known: the result, with outputs of that shape.
    products: see `Products`.
    sees_keys: bool, broadcastable to ``[..., C]``.
    is_zero: whether all features of a query are truly 0, ``[..., C]``; None for
      exponentials.
  """
  if magnitude is not None:
    out = normalise(sums[..., :-1], sums[..., -1], magnitude)
    is_lost = sees_keys & (magnitude < SMALLEST_NORMALIZER)
    if is_zero is not None:
      is_lost &= ~is_zero
    return jnp.where(is_lost[..., None], jnp.nan, out), None
  if known is not None:
    out = known.out.astype(jnp.float32)
    return products.mean_of_values(sums, (out, known.normalizer))
  out, normalizer = products.mean_of_values(sums, None)
  if is_zero is not None:
    return out, normalizer
  is_lost = sees_keys & (normalizer < SMALLEST_NORMALIZER)
  out = jnp.where(is_lost[..., None], jnp.nan, out)
  return out, jnp.where(is_lost, jnp.nan, normalizer)


def _add(state: State, psi: Array, value: Array, products: Products) -> State:
  """The state with more keys, of the same exponent; values `_with_ones`."""
  magnitude = state.magnitude
  if magnitude is not None:
    magnitude = magnitude + jnp.sum(jnp.abs(psi), axis=2)
  kv, rest = products.keys_times_values(psi, value), state.rest
  if rest is None:
    kv = state.kv + kv
  else:
    kv, rest = add_exactly(state.kv, kv, rest)
  return state._replace(kv=kv, magnitude=magnitude, rest=rest)


def _times_magnitude(phi: Array, state: State) -> Array | None:
  """Sums ``[..., C]`` of normalizers without signs; None for positive maps."""
  if state.magnitude is None:
    return None
  return jnp.einsum("...cf,...f->...c", jnp.abs(phi), state.magnitude)


def _seen_by(state: State, segment: Array) -> State:
  """The state as queries of the segments ``[B]`` see it: their own, or empty.

  An empty one has the lowest exponent: what another segment left must not
  decide what is too small to be kept.
  """
  same = (state.segment == segment)[:, None, None]
  keep = lambda sums: jnp.where(same, sums, 0.0)
  return state._replace(
    kv=jnp.where(same[..., None], state.kv, 0.0),
    magnitude=None if state.magnitude is None else keep(state.magnitude),
    exponent=jnp.where(same, state.exponent, LOWEST),
    segment=segment,
  )
