"""What happens inside one chunk of keys and queries.

States are `joined` here: the last column of their ``kv [B, N, F, V + 1]`` is
the sum of key features.
"""

from typing import NamedTuple

import jax.numpy as jnp

from spectraformer_jax.linear_attention.products import (
  keys_times_values,
  mean_of_values,
  queries_times_state,
)
from spectraformer_jax.linear_attention.state import (
  FeatureFn,
  State,
  key_features,
  normalise,
  query_features,
  rescale,
)
from spectraformer_jax.typing import Array, PyTree


class Found(NamedTuple):
  """What the queries of a chunk have found.

  Attributes:
    out: means of values, ``[B, N, G, C, V]``.
    normalizer: what they were divided by, ``[B, N, G C]``; None for signed
      maps.
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
    is_final: the state has the exponent of all keys already.
  """
  psi, exponent = key_features(
    key_map, constants, key, position, keep, state.exponent, is_final
  )
  return _add(rescale(state, exponent), psi, _with_ones(value))


def read(
  query_map: FeatureFn,
  constants: PyTree,
  state: State,
  query: Array,
  position: Array,
  known: Found | None = None,
) -> Found:
  """Queries ``[B, N, G, C, H]`` see the state.

  With `known`, the result, gradients alone are worked out.
  """
  phi, top = query_features(
    query_map, constants, query, position, state.exponent, known and known.top
  )
  sums = queries_times_state(phi, state.kv)
  magnitude = _times_magnitude(phi, state)
  out, normalizer = _mean(sums, magnitude, known)
  return Found(_by_group(out, query), normalizer, top)


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
    known: what was found, where gradients alone are wanted; else None.

  Returns:
    The state after them, and what their queries found.
  """
  groups, count = query.shape[2], query.shape[3] // chunk
  psi, exponent = key_features(
    key_map, constants, key, position, keep, state.exponent
  )
  before = rescale(state, exponent)
  phi, top = query_features(
    query_map, constants, query, position, exponent, known and known.top
  )
  visible = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None, None]
  if segment is not None:
    visible &= (segment[:, :, None] == segment[:, None, :])[:, None, None]
  visible = jnp.tile(visible, (1, 1, 1, groups, 1))

  def within(phi, psi):
    weights = jnp.einsum("...cf,...df->...cd", phi, psi)
    return jnp.where(visible, weights, 0.0)

  phi = _in_chunks(phi, groups, count)
  psi, value = (_in_chunks(x, 1, count) for x in (psi, _with_ones(value)))
  states, after = _states(before, psi, value)
  sums = queries_times_state(phi, states.kv)
  magnitude = _times_magnitude(phi, states)
  if segment is not None:
    old = jnp.tile(segment == before.segment[:, None], (1, groups))
    old = old[:, None, None]
    sums = jnp.where(old[..., None], sums, 0.0)
    if magnitude is not None:
      magnitude = jnp.where(old, magnitude, 0.0)
    after = _next_segment(before, psi[:, :, 0], value[:, :, 0], segment)
  sums += jnp.einsum("...cd,...dv->...cv", within(phi, psi), value)
  if magnitude is not None:
    magnitude += jnp.sum(within(jnp.abs(phi), jnp.abs(psi)), axis=-1)
    magnitude = _in_a_row(magnitude[..., None], groups)[..., 0]
  out, normalizer = _mean(_in_a_row(sums, groups), magnitude, known)
  return after, Found(_by_group(out, query), normalizer, top)


def _in_chunks(x: Array, groups: int, count: int) -> Array:
  """``[B, N, G S C, .] -> [B, N, S, G C, .]``, S the count of chunks."""
  batch, heads, _, depth = x.shape
  x = x.reshape(batch, heads, groups, count, -1, depth)
  return jnp.swapaxes(x, 2, 3).reshape(batch, heads, count, -1, depth)


def _in_a_row(x: Array, groups: int) -> Array:
  """Undoes `_in_chunks`."""
  batch, heads, count, _, depth = x.shape
  x = x.reshape(batch, heads, count, groups, -1, depth)
  return jnp.swapaxes(x, 2, 3).reshape(batch, heads, -1, depth)


def _states(state: State, psi: Array, value: Array) -> tuple[State, State]:
  """States before each chunk, ``[B, N, S, ...]``, and after the last."""

  def running(first, own):
    first = first[:, :, None]
    ends = first + jnp.cumsum(own, axis=2)
    return jnp.concatenate([first, ends[:, :, :-1]], axis=2), ends[:, :, -1]

  kv, last_kv = running(state.kv, keys_times_values(psi, value))
  magnitude = last_magnitude = None
  if state.magnitude is not None:
    magnitude, last_magnitude = running(
      state.magnitude, jnp.sum(jnp.abs(psi), axis=-2)
    )
  return (
    state._replace(kv=kv, magnitude=magnitude),
    state._replace(kv=last_kv, magnitude=last_magnitude),
  )


def _by_group(out: Array, query: Array) -> Array:
  """``[B, N, G C, V] -> [B, N, G, C, V]``, G and C as in `query`."""
  return out.reshape(*query.shape[:-1], out.shape[-1])


def _with_ones(value: Array) -> Array:
  """``[..., C, V] -> [..., C, V + 1]``: what the sum of keys is a sum of."""
  return jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)


def _mean(sums: Array, magnitude: Array | None, known: Found | None):
  """Outputs ``[B, N, G C, V]`` and, of positive maps, the normalizers."""
  if magnitude is not None:
    return normalise(sums[..., :-1], sums[..., -1], magnitude), None
  if known is None:
    return mean_of_values(sums, None)
  out = known.out.reshape(*sums.shape[:-1], -1)
  return mean_of_values(sums, (out, known.normalizer))


def _add(state: State, psi: Array, value: Array) -> State:
  """The state with more keys, of the same exponent; values `_with_ones`."""
  magnitude = state.magnitude
  if magnitude is not None:
    magnitude = magnitude + jnp.sum(jnp.abs(psi), axis=2)
  return state._replace(
    kv=state.kv + keys_times_values(psi, value), magnitude=magnitude
  )


def _times_magnitude(phi: Array, state: State) -> Array | None:
  """Sums ``[..., C]`` of normalizers without signs; None for positive maps."""
  if state.magnitude is None:
    return None
  return jnp.einsum("...cf,...f->...c", jnp.abs(phi), state.magnitude)


def _next_segment(state: State, psi, value, segment) -> State:
  """The state of the chunk's last segment alone."""
  last = segment[:, -1]
  same = (state.segment == last)[:, None, None]
  keep_old = jnp.where(same, 1.0, 0.0)
  state = state._replace(
    kv=state.kv * keep_old[..., None],
    magnitude=(None if state.magnitude is None else state.magnitude * keep_old),
    segment=last,
  )
  psi = jnp.where((segment == last[:, None])[:, None, :, None], psi, 0.0)
  return _add(state, psi, value)
