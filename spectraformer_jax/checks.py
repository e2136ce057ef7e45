"""Checks and masks of attention's arguments, shared by every entry point.

Checks depend on static shapes only, so they run before any compilation.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from spectraformer_jax.typing import Array, Mask, SegmentIds

LAYOUT = "the layout is [batch, length, heads, head_dim]"


def check_positive_int(name: str, number: Any) -> None:
  """Raises ValueError unless `number` is an int (or NumPy's) of at least 1."""
  is_int = isinstance(number, int | np.integer) and not isinstance(number, bool)
  if not is_int or number < 1:
    raise ValueError(f"{name} must be a positive integer, got {number!r}.")


def check_size(name: str, number: Any) -> None:
  """Raises ValueError unless `number` is an int >= 0 or a symbolic size."""
  if not (jax.export.is_symbolic_dim(number) or number == 0):
    check_positive_int(name, number)


def check_bool(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is a concrete bool."""
  if not isinstance(value, bool | int | np.bool_):
    raise ValueError(
      f"{name} must be True or False where the program is built, got "
      f"{value!r}: make it a static argument of jax.jit."
    )


def as_array(x: Any) -> Array | None:
  """Converts lists and NumPy arrays to arrays; None stays None."""
  return x if x is None or isinstance(x, jax.Array) else jnp.asarray(x)


def as_floats(**arrays: Any) -> list[Array]:
  """Converts to arrays; raises ValueError for an array that is not float."""
  converted = []
  for name, x in arrays.items():
    x = as_array(x)
    if x is None or not jnp.issubdtype(x.dtype, jnp.floating):
      got = None if x is None else f"dtype {x.dtype}"
      raise ValueError(
        f"{name} must be a float array, got {got}; convert "
        f"it with {name}.astype(jnp.float32)."
      )
    converted.append(x)
  return converted


def compute_dtype(x: Array) -> Any:
  """Returns float32, or float64 if x has it."""
  return x.dtype if x.dtype.itemsize > 4 else jnp.float32


def is_empty(*arrays: Array) -> bool:
  """Returns whether an axis of any array has size 0."""
  return any(size == 0 for x in arrays for size in x.shape)


class AttentionArrays(NamedTuple):
  """Arrays that attention takes, of shapes that agree.

  Attributes:
    query: ``[B, T, N G, H]`` float: G queries share a key head.
    key: ``[B, S, N, H]`` float.
    value: ``[B, S, N, V]`` float.
    key_mask: ``[B, S]`` bool, or None.
    query_mask: ``[B, T]`` bool, or None.
    segment_ids: ``[B, T]`` int, a pair ``([B, T], [B, S])``, or None.
  """

  query: Array
  key: Array
  value: Array
  key_mask: Mask = None
  query_mask: Mask = None
  segment_ids: SegmentIds | None = None


def attention_arrays(
  query: Any,
  key: Any,
  value: Any,
  *,
  key_mask: Any = None,
  query_mask: Any = None,
  segment_ids: Any = None,
) -> AttentionArrays:
  """Converts the arguments of attention; raises ValueError if they disagree."""
  query, key, value = as_floats(query=query, key=key, value=value)
  key_mask, query_mask = as_array(key_mask), as_array(query_mask)
  check_attention_inputs(query, key, value)
  check_mask(key_mask, key)
  check_mask(query_mask, query, "query_mask")
  segment_ids = as_segment_ids(segment_ids)
  return AttentionArrays(query, key, value, key_mask, query_mask, segment_ids)


def check_attention_inputs(
  query: Array, key: Array, value: Array, *, depth: str = "head_dim"
) -> None:
  """Raises ValueError unless the shapes of query, key and value agree.

  Args:
    query: ``[B, T, N G, H]``.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    depth: name of the axis H in the message.
  """
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
  query_heads, key_heads = query.shape[2], key.shape[2]
  if query_heads % key_heads if key_heads else query_heads:
    raise ValueError(
      "query heads must be a multiple of key heads (grouped-query "
      f"attention), {shapes}"
    )
  if key.shape[1] != value.shape[1]:
    raise ValueError(f"key and value must share length, {shapes}")


def check_mask(mask: Mask, x: Array, name: str = "key_mask") -> None:
  """Raises ValueError unless `mask` is None or bool, for x's positions."""
  if mask is None:
    return
  if mask.shape != x.shape[:2]:
    raise ValueError(
      f"{name} must be [batch, length] = {list(x.shape[:2])}, got "
      f"{name}.shape={mask.shape}; a mask over query and key positions "
      "cannot be honoured by linear attention: use is_causal=True for a "
      "causal mask, segment_ids for packed rows."
    )
  if mask.dtype != jnp.bool_:
    raise ValueError(
      f"{name} must be boolean (True = visible), got dtype {mask.dtype}; use "
      f"{name}.astype(bool) if non-zero means visible."
    )


def as_segment_ids(segment_ids: Any) -> SegmentIds | None:
  """Converts segment ids to an array ``[B, T]``, a pair of arrays, or None."""
  is_pair = isinstance(segment_ids, tuple) or (
    isinstance(segment_ids, list)
    and len(segment_ids) == 2
    and all(np.ndim(ids) == 2 for ids in segment_ids)
  )
  if not is_pair:
    return as_array(segment_ids)
  if len(segment_ids) != 2:
    raise ValueError(
      "segment_ids must be [B, T], or a pair ([B, T], [B, S]), got "
      f"{len(segment_ids)} arrays."
    )
  query_ids, key_ids = segment_ids
  return jnp.asarray(query_ids), jnp.asarray(key_ids)


def split_segment_ids(
  segment_ids: SegmentIds, query: Array, key: Array
) -> tuple[Array, Array]:
  """Returns the segment ids of queries [B, T] and of keys [B, S]."""
  if isinstance(segment_ids, tuple):
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
  for ids in (query_ids, key_ids):
    if not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(f"segment_ids must be ints, got dtype {ids.dtype}.")
  return query_ids, key_ids


def split_scale(
  scale: float | Array | None, head_dim: int
) -> tuple[float, Array | None]:
  """Splits sqrt(scale) into a Python number and an array that multiplies it.

  The array is None unless `scale` is an array, whose value may be traced. A
  scale of None means 1/sqrt(H).
  """
  if scale is None:
    return float(head_dim) ** -0.25, None
  if not isinstance(scale, jax.Array):
    if np.ndim(scale) or not scale > 0:
      raise ValueError(f"scale must be positive, got {scale!r}.")
    return math.sqrt(scale), None
  if scale.shape:
    raise ValueError(
      f"scale must be one number, got scale.shape={scale.shape}: multiply "
      "query instead."
    )
  return 1.0, jnp.sqrt(scale.astype(jnp.float32))


def times_factor(x: Array, factor: Array | None) -> Array:
  """Multiplies x by the array of `split_scale`, if there is one.

  Entries that are not finite stay as they are, so that the gradient of the
  scale is not NaN.
  """
  if factor is None:
    return x
  x = x.astype(compute_dtype(x))
  return x * jnp.where(jnp.isfinite(x), factor.astype(x.dtype), 1.0)


def static_position(position: Array | int | None) -> int:
  """Returns a position as an int; 0 for None and for a traced position."""
  if position is None or isinstance(position, Tracer):
    return 0
  return int(position)


def concrete(x: Array | np.ndarray) -> np.ndarray | None:
  """Returns the content of an array; None if it cannot be read now.

  That is so for a tracer, for a deleted array and for an array on devices of
  other processes.
  """
  if isinstance(x, Tracer):
    return None
  if isinstance(x, jax.Array) and (
    x.is_deleted() or not x.is_fully_addressable
  ):
    return None
  return np.asarray(jax.device_get(x))


def positions_before(lengths: Array, size: int) -> Array:
  """Returns a bool mask ``[B, size]``: True at positions below `lengths`."""
  return jnp.arange(size)[None, :] < lengths[:, None]


def visible_keys(
  query: Array,
  key: Array,
  is_causal: bool,
  key_mask: Mask,
  segment_ids: SegmentIds | None,
) -> Array:
  """Returns which keys each query may see, broadcastable to [B, N, T, S]."""
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
