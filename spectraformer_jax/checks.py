"""Checks and masks of attention's arguments, shared by every entry point.

Checks look at static shapes only, so they run before any compilation.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.typing import Array

LAYOUT = "the layout is [batch, length, heads, head_dim]"


def check_positive_int(name: str, number) -> None:
  """ValueError unless `number` is an int (or NumPy's) of at least 1."""
  is_int = isinstance(number, int | np.integer) and not isinstance(number, bool)
  if not is_int or number < 1:
    raise ValueError(f"{name} must be a positive integer, got {number!r}.")


def check_size(name: str, number) -> None:
  """ValueError unless `number` may be the size of an axis: 0, or symbolic."""
  if not (jax.export.is_symbolic_dim(number) or number == 0):
    check_positive_int(name, number)


def check_bool(name: str, value) -> None:
  """ValueError unless `value` is known where the program is built."""
  if not isinstance(value, bool | int | np.bool_):
    raise ValueError(
      f"{name} must be True or False where the program is built, got "
      f"{value!r}: make it a static argument of jax.jit."
    )


def as_array(x) -> Array | None:
  """Lists and NumPy's arrays as arrays; None stays None."""
  return x if x is None or isinstance(x, jax.Array) else jnp.asarray(x)


def as_floats(**arrays) -> list[Array]:
  """The arrays of attention, by name; ValueError for one that is not float."""
  found = []
  for name, x in arrays.items():
    x = as_array(x)
    if x is None or not jnp.issubdtype(x.dtype, jnp.floating):
      got = None if x is None else f"dtype {x.dtype}"
      raise ValueError(
        f"{name} must be a float array, got {got}; use "
        f"{name}.astype(jnp.float32) if its numbers are meant."
      )
    found.append(x)
  return found


def compute_dtype(x: Array):
  """float32, or float64 where x is."""
  return x.dtype if x.dtype.itemsize > 4 else jnp.float32


def is_empty(*arrays: Array) -> bool:
  """Whether an axis of any array has size 0."""
  return any(size == 0 for x in arrays for size in x.shape)


def check_attention_inputs(
  query: Array,
  key: Array,
  value: Array,
  *,
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
  groups, heads = query.shape[2], key.shape[2]
  if groups % heads if heads else groups:
    raise ValueError(
      "query heads must be a multiple of key heads (grouped-query "
      f"attention), {shapes}"
    )
  if key.shape[1] != value.shape[1]:
    raise ValueError(f"key and value must share length, {shapes}")


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


def as_segment_ids(segment_ids):
  """Segment ids as an array ``[B, T]``, a tuple of two, or None."""
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
  return tuple(as_array(ids) for ids in segment_ids)


def split_segment_ids(
  segment_ids: Array | tuple[Array, Array], query: Array, key: Array
) -> tuple[Array, Array]:
  """The segment ids of queries [B, T] and of keys [B, S]."""
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


def split_scale(scale: float | None, head_dim: int) -> float:
  """The factor on each side: the square root of `scale` (1/sqrt(H) if None)."""
  if scale is None:
    return float(head_dim) ** -0.25
  if np.ndim(scale) or not scale > 0:
    raise ValueError(f"scale must be positive, got {scale!r}.")
  return math.sqrt(scale)


def scale_parts(
  scale: float | Array | None, head_dim: int
) -> tuple[float, Array | None]:
  """`split_scale` as a constant, and a factor that the program computes.

  The latter is None but for an array, whose value nobody looks at.
  """
  if not isinstance(scale, jax.Array):
    return split_scale(scale, head_dim), None
  if scale.shape:
    raise ValueError(
      f"scale must be one number, got scale.shape={scale.shape}: multiply "
      "query instead."
    )
  return 1.0, jnp.sqrt(scale.astype(jnp.float32))


def times_root(x: Array, root: Array | None) -> Array:
  """Multiplies by a computed root; what is not finite has no gradient."""
  if root is None:
    return x
  x = x.astype(compute_dtype(x))
  return x * jnp.where(jnp.isfinite(x), root.astype(x.dtype), 1.0)


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
