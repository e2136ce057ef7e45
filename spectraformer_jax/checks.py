"""Checks and masks of attention's arguments, shared by every entry point.

Checks look at static shapes only, so they run before any compilation.
"""

import math

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array

LAYOUT = "the layout is [batch, length, heads, head_dim]"


def check_positive_int(name: str, number) -> None:
  """ValueError unless `number` is an int of at least 1."""
  if isinstance(number, bool) or not isinstance(number, int) or number < 1:
    raise ValueError(f"{name} must be a positive integer, got {number!r}.")


def check_attention_inputs(
  query: Array,
  key: Array,
  value: Array,
  *,
  is_causal: bool,
  depth: str = "head_dim",
) -> None:
  """ValueError unless query, key and value agree as attention needs it."""
  shapes = (
    f"got query.shape={query.shape}, key.shape={key.shape}, "
    f"value.shape={value.shape} ({LAYOUT})."
  )
  if not query.ndim == key.ndim == value.ndim == 4:
    raise ValueError(f"query, key and value must have 4 axes, {shapes}")
  if not query.shape[0] == key.shape[0] == value.shape[0]:
    raise ValueError(f"query, key and value must share batch, {shapes}")
  if query.shape[3] != key.shape[3]:
    raise ValueError(f"query and key must share {depth}, {shapes}")
  if key.shape[2] != value.shape[2]:
    raise ValueError(f"key and value must share heads, {shapes}")
  if query.shape[2] % key.shape[2]:
    raise ValueError(
      "query heads must be a multiple of key heads (grouped-query "
      f"attention), {shapes}"
    )
  if key.shape[1] != value.shape[1]:
    raise ValueError(f"key and value must share length, {shapes}")
  if is_causal and query.shape[1] != key.shape[1]:
    raise ValueError(f"is_causal needs query and key of one length, {shapes}")


def check_key_mask(
  key_mask: Array | None, key: Array, name: str = "key_mask"
) -> None:
  """ValueError unless `key_mask` is None or a bool [B, S] mask."""
  if key_mask is None:
    return
  expected = (key.shape[0], key.shape[1])
  if key_mask.shape != expected:
    raise ValueError(
      f"{name} must be [batch, length] = {list(expected)}, got "
      f"{name}.shape={key_mask.shape}; a mask over query and key positions "
      "cannot be honoured by linear attention: use is_causal=True for a "
      "causal mask, segment_ids for packed rows."
    )
  if key_mask.dtype != jnp.bool_:
    raise ValueError(
      f"{name} must be boolean (True = visible), got dtype "
      f"{key_mask.dtype}; use {name}.astype(bool) if non-zero means visible."
    )


def split_segment_ids(
  segment_ids: Array | tuple[Array, Array], query: Array, key: Array
) -> tuple[Array, Array]:
  """The segment ids of queries [B, T] and of keys [B, S]."""
  if isinstance(segment_ids, tuple | list):
    query_ids, key_ids = segment_ids
  else:
    query_ids = key_ids = segment_ids
  expected = (query.shape[:2], key.shape[:2])
  if (query_ids.shape, key_ids.shape) != expected:
    raise ValueError(
      f"segment_ids must be [B, T] = {list(expected[0])} and [B, S] = "
      f"{list(expected[1])}, got {query_ids.shape} and {key_ids.shape}; pass "
      "a pair (query_ids, key_ids) where T != S."
    )
  return query_ids, key_ids


def split_scale(scale: float | None, head_dim: int) -> float:
  """The factor on each side: the square root of `scale` (1/sqrt(H) if None)."""
  if scale is None:
    return float(head_dim) ** -0.25
  if not scale > 0:
    raise ValueError(f"scale must be positive, got {scale!r}.")
  return math.sqrt(scale)


def known(position) -> int:
  """A position that is known while tracing; 0 for None and a traced one."""
  if position is None or isinstance(position, jax.core.Tracer):
    return 0
  return int(position)


def positions_before(lengths: Array, size: int) -> Array:
  """Bool ``[B, size]``: True at the first `lengths` ``[B]`` positions."""
  return jnp.arange(size)[None, :] < lengths[:, None]


def visible_keys(query, key, is_causal, key_mask, segment_ids) -> Array:
  """Bool, broadcastable to [B, N, T, S]: which key each query may see."""
  num_queries, num_keys = query.shape[1], key.shape[1]
  visible = jnp.ones((1, 1, num_queries, num_keys), bool)
  if is_causal:
    visible = jnp.tril(visible)
  if key_mask is not None:
    visible = visible & key_mask[:, None, None, :]
  if segment_ids is not None:
    query_ids, key_ids = split_segment_ids(segment_ids, query, key)
    same = query_ids[:, :, None] == key_ids[:, None, :]
    visible = visible & same[:, None]
  return visible
