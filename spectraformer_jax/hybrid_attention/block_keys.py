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
  """Gradients of keys and of their values."""

  key: Array
  value: Array


class SetGradients(NamedTuple):
  """Gradients of a row's key array, and of its special keys."""

  row: KeyValue
  special: KeyValue


def pad_row(setting: Setting, row: Row, length: int) -> Row:
  """Pads a row to `length` queries, flat, of which each has a whole window."""
  row = row._replace(query=blocks.pad(blocks.flat(row.query), length))
  special = row.special
  if row.segment is not None:
    special = SpecialKeys(*(blocks.pad(x, length) for x in special))
  if setting.exact.window is None:
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
  """Returns the sets of keys of `size` queries, special keys first.

  Args:
    setting: see `Setting`.
    row: from `pad_row`.
    position: of the first query.
    size: number of queries, C.
  """
  key, value, at = row.special
  if row.segment is None:
    last = HIDDEN / 2  # beyond all positions; HIDDEN - 1 is no float32
    if setting.is_causal:
      last = (position + jnp.arange(size))[None, None, None, :, None]
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
  return [special, BlockKeys(key, value, is_near)]


def no_gradients(row: Row) -> SetGradients:
  """Returns gradients of zero."""
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
  """Adds gradients of `keys_of_block` where its keys came from."""
  special, *near = found
  if row.segment is None:
    of_special = KeyValue(*map(jnp.add, total.special, special))
  else:
    of_special = _add_at(total.special, special, position)
  of_row = total.row
  for of_set in near:
    of_row = _add_at(of_row, of_set, position)
  return SetGradients(of_row, of_special)


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
