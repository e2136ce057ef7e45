"""What happens inside one chunk of keys and queries."""

import jax.numpy as jnp

from spectraformer_jax.linear_attention.state import (
  FeatureFn,
  State,
  key_features,
  normalise,
  query_features,
  rescale,
)
from spectraformer_jax.typing import Array, PyTree


def add_keys(
  key_map: FeatureFn,
  constants: PyTree,
  state: State,
  key: Array,
  value: Array,
  position: Array,
  keep: Array | None,
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
  """
  psi, exponent = key_features(
    key_map, constants, key, position, keep, state.exponent
  )
  return _add(rescale(state, exponent), psi, value)


def read(
  query_map: FeatureFn,
  constants: PyTree,
  state: State,
  query: Array,
  position: Array,
) -> Array:
  """Queries ``[B, N, G, C, H]`` see the state -> ``[B, N, G, C, V]``."""
  phi = query_features(query_map, constants, query, position, state.exponent)
  return _by_group(normalise(*_sums_of_state(state, phi)), query)


def causal_chunk(
  query_map: FeatureFn,
  key_map: FeatureFn,
  constants: PyTree,
  state: State,
  query: Array,
  key: Array,
  value: Array,
  position: Array,
  keep: Array | None,
  segment: Array | None,
) -> tuple[State, Array]:
  """Outputs of a chunk whose queries see the state and earlier keys.

  Args:
    query_map: the feature map of queries.
    key_map: that of keys.
    constants: their variables.
    state: sums over the keys before the chunk.
    query: ``[B, N, G, C, H]``.
    key: ``[B, N, C, H]``.
    value: ``[B, N, C, V]``.
    position: of the first of the chunk.
    keep: bool ``[B, 1, C, 1]`` or None.
    segment: ids ``[B, C]`` of packed rows (not decreasing), or None.

  Returns:
    The state after the chunk and outputs ``[B, N, G, C, V]``.
  """
  groups, length = query.shape[2:4]
  psi, exponent = key_features(
    key_map, constants, key, position, keep, state.exponent
  )
  before = rescale(state, exponent)
  phi = query_features(query_map, constants, query, position, exponent)
  visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
  if segment is not None:
    visible &= (segment[:, :, None] == segment[:, None, :])[:, None]
  visible = jnp.tile(visible, (1, 1, groups, 1))

  def within(phi, psi):
    weights = jnp.einsum("bncf,bndf->bncd", phi, psi)
    return jnp.where(visible, weights, 0.0)

  weights = within(phi, psi)
  numerator, normalizer, magnitude = _sums_of_state(before, phi)
  if segment is not None:
    old = jnp.tile(segment == before.segment[:, None], (1, groups))[:, None]
    numerator = jnp.where(old[..., None], numerator, 0.0)
    normalizer = jnp.where(old, normalizer, 0.0)
    if magnitude is not None:
      magnitude = jnp.where(old, magnitude, 0.0)
  numerator += jnp.einsum("bncd,bndv->bncv", weights, value)
  normalizer += jnp.sum(weights, axis=-1)
  if magnitude is not None:
    magnitude += jnp.sum(within(jnp.abs(phi), jnp.abs(psi)), axis=-1)
  out = _by_group(normalise(numerator, normalizer, magnitude), query)
  if segment is None:
    return _add(before, psi, value), out
  return _next_segment(before, psi, value, segment), out


def _by_group(out: Array, query: Array) -> Array:
  """``[B, N, G C, V] -> [B, N, G, C, V]``, G and C as in `query`."""
  return out.reshape(*query.shape[:-1], out.shape[-1])


def _add(state: State, psi: Array, value: Array) -> State:
  """The state with more keys, of the same exponent."""
  magnitude = state.magnitude
  if magnitude is not None:
    magnitude = magnitude + jnp.sum(jnp.abs(psi), axis=2)
  return state._replace(
    kv=state.kv + jnp.einsum("bncf,bncv->bnfv", psi, value),
    total=state.total + jnp.sum(psi, axis=2),
    magnitude=magnitude,
  )


def _sums_of_state(state: State, phi: Array):
  """Numerator, normalizer and magnitude that queries find in the state."""
  numerator = jnp.einsum("bncf,bnfv->bncv", phi, state.kv)
  normalizer = jnp.einsum("bncf,bnf->bnc", phi, state.total)
  if state.magnitude is None:
    return numerator, normalizer, None
  magnitude = jnp.einsum("bncf,bnf->bnc", jnp.abs(phi), state.magnitude)
  return numerator, normalizer, magnitude


def _next_segment(state: State, psi, value, segment) -> State:
  """The state of the chunk's last segment alone."""
  last = segment[:, -1]
  same = (state.segment == last)[:, None, None]
  keep_old = jnp.where(same, 1.0, 0.0)
  state = state._replace(
    kv=state.kv * keep_old[..., None],
    total=state.total * keep_old,
    magnitude=(None if state.magnitude is None else state.magnitude * keep_old),
    segment=last,
  )
  psi = jnp.where((segment == last[:, None])[:, None, :, None], psi, 0.0)
  return _add(state, psi, value)
