"""Forms of masks that linear attention can honour, and how to recognise them.

The content of a mask is known either while a program is built (then the mask is
a NumPy array) or only when the program runs (then it is a JAX array). The
functions here serve both: they use the array's own module, `xp`.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from spectraformer_jax import checks

# Content of a mask: a NumPy array if it is known while the program is built,
# else a jax.Array. The type is Any because the type stubs of NumPy and JAX
# disagree on the operations used here.
MaskArray: TypeAlias = Any

# A bias of at most this hides a key as well as -inf does: beside any score,
# its exponential is 0.
_HIDING_BIAS = -1e4

_HOW_TO_GET_BOOL = (
  "use mask >= 0 if it holds 0 and -inf, mask.astype(bool) if non-zero means "
  "visible"
)


class Form(NamedTuple):
  """A mask ``[B or 1, T, S]``, in terms that linear attention can follow.

  A query sees the keys of its own group whose rank is at most its own. Groups
  are None if all are one group. Ranks are None if all keys are seen, or if the
  positions of keys and queries stand in for them.

  Attributes:
    matches: bool ``[B or 1]``: whether the mask has this form. Where it does
      not, the other fields mean nothing.
    query_mask: bool ``[B or 1, T]``: queries that see any key.
    key_mask: bool ``[B or 1, S]``: keys that any query sees.
    query_group: ints ``[B or 1, T]``.
    key_group: ints ``[B or 1, S]``.
    query_rank: ints ``[B or 1, T]``.
    key_rank: ints ``[B or 1, S]``.
  """

  matches: MaskArray
  query_mask: MaskArray
  key_mask: MaskArray
  query_group: MaskArray = None
  key_group: MaskArray = None
  query_rank: MaskArray = None
  key_rank: MaskArray = None


def module_of(x: MaskArray) -> ModuleType:
  """Returns numpy for a NumPy array, and jax.numpy for any other."""
  return np if isinstance(x, np.ndarray) else jnp


def read_mask(
  mask: MaskArray, shape: tuple[int, ...], *, must_be_bool: bool
) -> tuple[MaskArray, MaskArray]:
  """Reads which keys a mask lets each query see.

  Args:
    mask: broadcast against `shape`; entries that are not zero are visible.
    shape: ``[batch..., N, T, S]``.
    must_be_bool: refuses masks of numbers.

  Returns:
    Visible keys, bool ``[B or 1, N or 1, T or 1, S]``; and bool ``[B or 1]``,
    False where entries are negative, so that they cannot be those of a mask.

  Raises:
    ValueError: another shape or dtype, or entries known to be negative.
  """
  mask = _known(mask)
  if must_be_bool and mask.dtype != np.bool_:
    raise ValueError(
      f"mask must be boolean (True = visible), got dtype {mask.dtype}; "
      f"{_HOW_TO_GET_BOOL}."
    )
  mask = _with_four_axes("mask", mask, shape)
  if not jnp.issubdtype(mask.dtype, jnp.floating):
    return mask != 0, module_of(mask).ones(1, bool)
  is_valid = (mask >= 0).all(axis=(1, 2, 3))
  if isinstance(is_valid, np.ndarray) and not is_valid.all():
    raise ValueError(
      f"mask (dtype {mask.dtype}) has negative entries: an additive mask goes "
      f"to bias=; else {_HOW_TO_GET_BOOL}."
    )
  return mask != 0, is_valid


def read_bias(
  bias: MaskArray, shape: tuple[int, ...]
) -> tuple[MaskArray, MaskArray]:
  """Reads a bias of 0 and -inf as a mask; see `read_mask`.

  Raises:
    ValueError: another shape, or content that is known to be no mask.
  """
  bias = _with_four_axes("bias", _known(bias), shape)
  is_valid = ((bias == 0) | (bias <= _HIDING_BIAS)).all(axis=(1, 2, 3))
  is_known = isinstance(is_valid, np.ndarray)
  if not is_valid.all() if is_known else bias.shape[1] > 1:
    raise ValueError(
      f"bias (of shape {bias.shape}) cannot be honoured by random-feature "
      "attention: there are no scores to add it to. Only a mask in the form of "
      "a bias can, the same for all heads: 0 where a key is seen, -inf or the "
      "least float where not."
    )
  return bias == 0, is_valid


def _known(x: MaskArray) -> MaskArray:
  """Converts to a NumPy array if the content is known."""
  values = checks.concrete(x)
  return x if values is None else values


def _with_four_axes(
  name: str, x: MaskArray, shape: tuple[int, ...]
) -> MaskArray:
  """Broadcasts x to ``[B or 1, N or 1, T or 1, S]``, with sizes of `shape`.

  Raises:
    ValueError: x cannot be broadcast to `shape`.
  """
  own_shape = x.shape
  extra = len(own_shape) - len(shape)
  if extra > 0 and set(own_shape[:extra]) == {1}:
    own_shape = own_shape[extra:]
  own_shape = (1,) * (len(shape) - len(own_shape)) + own_shape
  if len(own_shape) != len(shape) or any(
    size not in (1, full) for size, full in zip(own_shape, shape, strict=True)
  ):
    raise ValueError(
      f"{name} must be broadcastable to [batch, heads, query length, key "
      f"length] = {list(shape)}, got {name}.shape={x.shape}; one over keys "
      f"[batch, key length] is {name}[:, None, None, :]."
    )
  *batch, heads, rows, _ = own_shape
  if any(size != 1 for size in batch):
    batch = shape[:-3]
  x = module_of(x).broadcast_to(
    x.reshape(own_shape), (*batch, heads, rows, shape[-1])
  )
  return x.reshape(math.prod(batch), heads, rows, shape[-1])


def _form(visible: MaskArray, allowed: MaskArray, **fields: MaskArray) -> Form:
  """Makes a form whose queries see keys where `allowed` ``[B or 1, T, S]``.

  It also masks queries that see no key, and keys that no query sees. It matches
  where the result equals `visible`.
  """
  query_mask, key_mask = visible.any(axis=2), visible.any(axis=1)
  allowed = allowed & query_mask[:, :, None] & key_mask[:, None]
  matches = (allowed == visible).all(axis=(1, 2))
  return Form(matches, query_mask, key_mask, **fields)


def product_form(visible: MaskArray, is_causal: bool) -> Form:
  """Recognises real queries times real keys, within the triangle if causal.

  Args:
    visible: bool ``[B or 1, T, S]``; if causal, within the triangle.
    is_causal: whether there is a triangle.
  """
  # A triangle of size (1, 1) is one True, for all queries and keys.
  size = visible.shape[1:] if is_causal else (1, 1)
  return _form(visible, triangle(*size)[None])


def segment_form(visible: MaskArray, *, is_causal: bool) -> Form:
  """Recognises packed rows, T == S, as groups; within the triangle if causal.

  The group of a query is the first key that it sees; the group of a key is that
  of the first query that sees it. A query and a key at the same position have
  one group: that of the key, or that of the query if no query sees the key.
  """
  xp = module_of(visible)
  first_key = visible.argmax(axis=2)
  key_group = xp.take_along_axis(first_key, visible.argmax(axis=1), axis=1)
  group = xp.where(visible.any(axis=1), key_group, first_key)
  allowed = group[:, :, None] == group[:, None]
  if is_causal:
    allowed = allowed & triangle(*visible.shape[1:])[None]
  return _form(visible, allowed, query_group=group, key_group=group)


def chain_form(visible: MaskArray) -> Form:
  """Recognises groups of queries that see nested sets of keys.

  The sets are nested within a group, and disjoint between groups. Examples are
  packed rows, causal or not, a prefix that all queries see, and the keys of a
  cache. The group of a query is the key, among those it sees, that most queries
  see; the group of a key is that of a query that sees it. The rank of a query
  is the number of keys it sees, and the rank of a key is the least rank of the
  queries that see it.
  """
  xp = module_of(visible)
  num_keys, num_viewers = visible.sum(axis=2), visible.sum(axis=1)
  query_group = xp.where(visible, num_viewers[:, None], -1).argmax(axis=2)
  key_group = xp.take_along_axis(query_group, visible.argmax(axis=1), axis=1)
  key_rank = xp.where(visible, num_keys[:, :, None], visible.shape[2] + 1).min(
    axis=1
  )
  allowed = query_group[:, :, None] == key_group[:, None]
  allowed = allowed & (key_rank[:, None] <= num_keys[:, :, None])
  return _form(
    visible,
    allowed,
    query_group=query_group,
    key_group=key_group,
    query_rank=num_keys,
    key_rank=key_rank,
  )


def position_form(visible: MaskArray) -> Form:
  """Recognises queries that stand at keys and see all keys up to their own.

  The rank of a query is its position: that of the last key it sees. The rank of
  a key is its own position. No two queries stand at the same position.
  """
  num_keys = visible.shape[2]
  rank = num_keys - 1 - visible[:, :, ::-1].argmax(axis=2)
  position = np.arange(num_keys)[None, None]
  form = _form(visible, position <= rank[:, :, None], query_rank=rank)
  stands_at = (position == rank[:, :, None]) & form.query_mask[:, :, None]
  is_apart = (stands_at.sum(axis=1) <= 1).all(axis=1)
  return form._replace(matches=form.matches & is_apart)


def triangle(num_queries: int, num_keys: int) -> np.ndarray:
  """Returns bool ``[T, S]``: query i sees keys 0..i."""
  return np.tri(num_queries, num_keys, dtype=bool)
