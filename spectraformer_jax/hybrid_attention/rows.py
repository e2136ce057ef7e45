"""The row of one call: finds special keys, sorts packed rows, fills windows."""

import jax
import jax.numpy as jnp

from spectraformer_jax.hybrid_attention import selection
from spectraformer_jax.hybrid_attention.layout import Row, Setting
from spectraformer_jax.hybrid_attention.selection import HIDDEN, SpecialKeys
from spectraformer_jax.hybrid_attention.state import HybridState
from spectraformer_jax.hybrid_attention.take import take_special
from spectraformer_jax.linear_attention.inputs import Inputs
from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.linear_attention.xla.segments import (
  SortedRows,
  sort_rows,
)
from spectraformer_jax.typing import Array, Mask


def unpacked(
  setting: Setting, inputs: Inputs, query_mask: Mask, state: HybridState
) -> Row:
  """Returns the row of a call without segments.

  Args:
    setting: see `Setting`.
    inputs: hidden keys are zeros.
    query_mask: ``[B, T]`` bool or None: queries that count for heavy keys.
    state: of the keys before; empty if there are none.
  """
  exact, (query, key, value, key_mask, _) = setting.exact, inputs
  visible = jnp.ones(key.shape[:2], bool) if key_mask is None else key_mask
  length = key.shape[1]
  scaled = lambda x: x.astype(jnp.float32) * setting.sqrt_scale
  choice = selection.choose(
    exact,
    setting.kernel,
    scaled(query),
    scaled(key),
    query_mask,
    visible,
    state.sink_count,
  )
  keep = choice.is_rest
  key, value, new = _taken(key, value, choice.sinks[:, None])
  special = _sinks(state, new)
  if choice.heavy is not None:
    key, value, heavy = _taken(key, value, choice.heavy)
    special = _join(special, heavy)
  if setting.is_causal and query.shape[1] != length:
    # The shorter one is padded: with queries of zeros, or with hidden keys.
    length = max(query.shape[1], length)
    query, key, value, keep = (
      _pad(x, 0, length - x.shape[1]) for x in (query, key, value, keep)
    )
  if exact.window is None:
    return Row(query, key, value, keep, special, None)
  _, ring_key, ring_value, ring_visible, *_ = state
  assert (
    ring_key is not None and ring_value is not None and ring_visible is not None
  )
  join = lambda before, x: jnp.concatenate(
    [before.astype(x.dtype), _pad(x, 0, exact.right)], axis=1
  )
  in_row = lambda x: jnp.swapaxes(x, 1, 2)
  seen = ring_visible[:, 0]
  if keep.ndim == 3:
    seen = jnp.broadcast_to(seen[..., None], (*seen.shape, keep.shape[2]))
  return Row(
    query,
    join(in_row(ring_key), key),
    join(in_row(ring_value), value),
    join(seen, keep),
    special,
    None,
  )


def packed(
  setting: Setting, inputs: Inputs, *, is_causal: bool
) -> tuple[Row, SortedRows]:
  """Returns the row of a call with segments, and the order of its places.

  Args:
    setting: of the sorted row. With a window, queries and keys of one position
      share a place. Without one, the keys of a segment come before its queries,
      so that the row is causal even where the call is not.
    inputs: hidden keys are zeros.
    is_causal: whether the call is causal.
  """
  exact = setting.exact
  rows = sort_rows(inputs, is_causal=is_causal, keys_first=exact.window is None)
  query, key, value, key_mask, ids = rows.inputs
  assert ids is not None
  segment = ids[0]
  visible = jnp.ones(key.shape[:2], bool) if key_mask is None else key_mask
  rank = selection.rank_of_visible(visible, segment)
  is_sink = visible & (rank < exact.num_sinks)
  at = selection.packed_sink_positions(is_sink, segment, exact.num_sinks)
  length = key.shape[1]
  is_seen = at < length
  if setting.is_causal:
    is_seen &= at <= jnp.arange(length)[None, :, None]
  take = jax.vmap(lambda x, index: x[index])
  # [B, T, P, N, H] -> [B, T, N, P, H]
  of_query = lambda x: jnp.swapaxes(take(x, jnp.minimum(at, length - 1)), 2, 3)
  position = jnp.where(is_seen, jnp.float32(0.0), HIDDEN)[:, :, None]
  special = SpecialKeys(of_query(key), of_query(value), position)
  around = exact.left, exact.right
  row = Row(
    query,
    _pad(key, *around),
    _pad(value, *around),
    _pad(visible & ~is_sink, *around),
    special,
    _pad(segment, *around, mode="edge"),
  )
  return row, rows


def state_after(
  setting: Setting, inputs: Inputs, row: Row, before: HybridState, far: State
) -> HybridState:
  """Returns the state after a causal call without segments.

  Args:
    setting: see `Setting`.
    inputs: of the call.
    row: from `unpacked`.
    before: the state before the call.
    far: sums after the far keys.
  """
  exact, length = setting.exact, inputs.key.shape[1]
  visible = inputs.key_mask
  count = length if visible is None else jnp.sum(visible, axis=1, keepdims=True)
  after = before._replace(
    far=far._replace(length=before.length + length),
    sink_key=row.special.key,
    sink_value=row.special.value,
    sink_count=jnp.minimum(before.sink_count + count, exact.num_sinks).astype(
      jnp.int32
    ),
  )
  if exact.window is None:
    return after
  last = lambda x: x[:, length : length + exact.left]
  return after._replace(
    ring_key=jnp.swapaxes(last(row.key), 1, 2),
    ring_value=jnp.swapaxes(last(row.value), 1, 2),
    ring_visible=last(row.key_mask)[:, None],
  )


def _taken(
  key: Array, value: Array, at: Array
) -> tuple[Array, Array, SpecialKeys]:
  """Returns key and value, and the keys at positions ``[B, N or 1, P]``."""
  length = key.shape[1]
  inside = jnp.minimum(at, length - 1)
  key, special_key = take_special(key, inside)
  value, special_value = take_special(value, inside)
  position = jnp.where(at < length, at.astype(jnp.float32), HIDDEN)
  return key, value, SpecialKeys(special_key, special_value, position)


def _sinks(state: HybridState, new: SpecialKeys) -> SpecialKeys:
  """Returns the sinks of the state and the new ones."""
  is_new = (new.position < HIDDEN)[..., None]
  is_old = jnp.arange(new.key.shape[2])[None] < state.sink_count
  return SpecialKeys(
    jnp.where(is_new, new.key, state.sink_key.astype(new.key.dtype)),
    jnp.where(is_new, new.value, state.sink_value.astype(new.value.dtype)),
    jnp.where(is_old[:, None], -1.0, new.position),
  )


def _join(sinks: SpecialKeys, heavy: SpecialKeys) -> SpecialKeys:
  """Returns both kinds of special keys in one record."""
  shape = (*heavy.position.shape[:2], sinks.position.shape[2])
  sinks = sinks._replace(position=jnp.broadcast_to(sinks.position, shape))
  return SpecialKeys(
    *(jnp.concatenate(both, axis=2) for both in zip(sinks, heavy, strict=True))
  )


def _pad(x: Array, before: int, after: int, mode: str = "constant") -> Array:
  """Pads axis 1."""
  widths = [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths, mode=mode)
