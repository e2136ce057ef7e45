"""The keys that a block of queries sees exactly: special and near ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.hybrid_attention.layout import Row, Setting
from spectraformer_jax.hybrid_attention.scores import BlockKeys
from spectraformer_jax.hybrid_attention.selection import HIDDEN, SpecialKeys
from spectraformer_jax.linear_attention.xla import blocks
from spectraformer_jax.typing import Array


class KeyValue(NamedTuple):
  """Keys and their values, or the gradients of both."""

  key: Array
  value: Array


class SetGradients(NamedTuple):
  """Gradients of a row's key array, and of its special keys."""

  row: KeyValue
  special: KeyValue


def pad_row(setting: Setting, row: Row, length: int) -> Row:
  """Flattens queries, pads them to `length`, and pads keys to whole windows."""
  row = row._replace(query=blocks.pad(blocks.flat(row.query), length))
  special = row.special
  if row.segment is not None:
    special = SpecialKeys(*(blocks.pad(x, length) for x in special))
  if setting.exact.window is None and not setting.is_causal:
    # Keys have a length of their own.
    return row._replace(special=special)
  length += setting.exact.left + setting.exact.right
  segment = row.segment
  return row._replace(
    key=blocks.pad(row.key, length),
    value=blocks.pad(row.value, length),
    key_mask=blocks.pad(row.key_mask, length),
    special=special,
    segment=None if segment is None else blocks.pad(segment, length, "edge"),
  )


def keys_of_block(
  setting: Setting, row: Row, position: Array | int, size: int
) -> list[BlockKeys]:
  """Returns the keys of `size` queries, special ones first.

  They are one set, but in packed rows with a window two: there each query has
  special keys of its own.

  Args:
    setting: see `Setting`.
    row: from `pad_row`.
    position: of the first query.
    size: number of queries, C.
  """
  key, value, at = row.special
  if row.segment is None:
    last = HIDDEN / 2  # beyond all positions; HIDDEN - 1 rounds to HIDDEN
    if setting.is_causal:
      place = (position + jnp.arange(size)).astype(jnp.float32)
      last = place[None, None, None, :, None]
    special = BlockKeys(key, value, at[:, :, None, None] <= last)
  else:
    key, value, at = (_take(x, position, size) for x in row.special)
    special = BlockKeys(key, value, at[:, :, None] == 0.0)
  if setting.exact.window is None:
    return [special]
  left, right = setting.exact.window
  width = left + size + right
  offset = jnp.arange(width)[None] - jnp.arange(size)[:, None]
  is_near = ((offset >= 0) & (offset <= left + right))[None, None, None]
  mask = _take(row.mask_by_head(), position, width)
  is_near &= mask[:, :, None, None]
  if row.segment is not None:
    ids = _slice(row.segment, position, width)
    own = ids[:, left : left + size]
    is_near &= (own[:, :, None] == ids[:, None])[:, None, None]
  key, value = (_take(x, position, width) for x in (row.key, row.value))
  near = BlockKeys(key, value, is_near)
  if row.segment is not None:
    return [special, near]
  shape = jnp.broadcast_shapes(
    special.is_visible.shape[:-1], near.is_visible.shape[:-1]
  )
  sees_special, sees_near = (
    jnp.broadcast_to(x, (*shape, x.shape[-1]))
    for x in (special.is_visible, near.is_visible)
  )
  return [
    BlockKeys(
      jnp.concatenate([special.key, key], axis=2),
      jnp.concatenate([special.value, value], axis=2),
      jnp.concatenate([sees_special, sees_near], axis=-1),
    )
  ]


def no_gradients(row: Row) -> SetGradients:
  """Returns the zeros to which `add_gradients` adds."""
  return SetGradients(
    KeyValue(*map(blocks.empty_like, (row.key, row.value))),
    KeyValue(*map(blocks.empty_like, row.special[:2])),
  )


def add_gradients(
  total: SetGradients,
  row: Row,
  found: list[KeyValue],
  position: Array | int,
) -> SetGradients:
  """Adds gradients of a block's keys where `keys_of_block` took the keys."""
  if row.segment is None:
    (both,) = found
    count = total.special.key.shape[2]
    special = KeyValue(*(x[:, :, :count] for x in both))
    near = KeyValue(*(x[:, :, count:] for x in both))
    of_special = KeyValue(*map(jnp.add, total.special, special))
  else:
    special, *sets = found
    of_special = _add_at(total.special, special, position)
    near = sets[0] if sets else None
  if near is None or not near.key.shape[2]:
    return SetGradients(total.row, of_special)
  return SetGradients(_add_at(total.row, near, position), of_special)


def _add_at(whole: KeyValue, part: KeyValue, position: Array | int) -> KeyValue:
  """Adds ``[B, N, C, ...]`` to ``[B, S, N, ...]``, from a position on."""

  def add(x: Array, part: Array) -> Array:
    part = jnp.swapaxes(part, 1, 2)
    part += _slice(x, position, part.shape[1])
    return jax.lax.dynamic_update_slice_in_dim(x, part, position, axis=1)

  return KeyValue(*map(add, whole, part))


def _take(x: Array, position: Array | int, size: int) -> Array:
  """Reads ``[B, S, N, ...]`` from a position on, as ``[B, N, C, ...]``."""
  return jnp.swapaxes(_slice(x, position, size), 1, 2)


def _slice(x: Array, position: Array | int, size: int) -> Array:
  return jax.lax.dynamic_slice_in_dim(x, position, size, axis=1)
