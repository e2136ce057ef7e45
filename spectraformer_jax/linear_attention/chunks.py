"""What happens inside one chunk of keys and queries."""

import jax.numpy as jnp

from spectraformer_jax.linear_attention.products import (
  keys_times_values,
  mean_of_values,
  queries_times_state,
)
from spectraformer_jax.linear_attention.state import (
  FeatureFn,
  State,
  guarded,
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
  return _add(rescale(state, exponent), psi, value)


def read(
  query_map: FeatureFn,
  constants: PyTree,
  state: State,
  query: Array,
  position: Array,
  top: Array | None = None,
) -> tuple[Array, Array | None]:
  """Queries ``[B, N, G, C, H]`` see the state.

  Returns:
    ``[B, N, G, C, V]`` and the largest exponent of each query, which may be
    given as `top` where it is known; see `query_features`.
  """
  phi, top = query_features(
    query_map, constants, query, position, state.exponent, top
  )
  normalizer = guarded(*_normalizers(state, phi))
  out = mean_of_values(phi, state.kv, normalizer)
  return _by_group(out, query), top


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
  phi, _ = query_features(query_map, constants, query, position, exponent)
  visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
  if segment is not None:
    visible &= (segment[:, :, None] == segment[:, None, :])[:, None]
  visible = jnp.tile(visible, (1, 1, groups, 1))

  def within(phi, psi):
    weights = jnp.einsum("bncf,bndf->bncd", phi, psi)
    return jnp.where(visible, weights, 0.0)

  weights = within(phi, psi)
  numerator = queries_times_state(phi, before.kv)
  normalizer, magnitude = _normalizers(before, phi)
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
    kv=state.kv + keys_times_values(psi, value),
    total=state.total + jnp.sum(psi, axis=2),
    magnitude=magnitude,
  )


def _normalizers(state: State, phi: Array):
  """Normalizer and magnitude ``[B, N, G C]`` that queries find in the state."""
  normalizer = jnp.einsum("bncf,bnf->bnc", phi, state.total)
  if state.magnitude is None:
    return normalizer, None
  magnitude = jnp.einsum("bncf,bnf->bnc", jnp.abs(phi), state.magnitude)
  return normalizer, magnitude


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
