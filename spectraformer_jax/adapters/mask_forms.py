"""Masks over query and key positions, taken apart for linear attention.

A mask that is known is a numpy array and looked at while a program is built;
others are looked at when it runs. The functions here serve both.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.typing import Array

# Of an additive bias, as good as -inf: exp gives 0 beside any score.
HIDDEN = -1e4

NOT_BOOLEAN = (
  "use mask >= 0 if it holds 0 and -inf, mask.astype(bool) if non-zero means "
  "visible"
)


class Form(NamedTuple):
  """What linear attention needs to know of a mask ``[B or 1, T, S]``.

  Attributes:
    queries: bool ``[B or 1, T]``: those that see a key.
    keys: bool ``[B or 1, S]``: those that are seen.
    holds: bool ``[B or 1]``: whether the mask has this form.
    of_query: ids ``[B or 1, T]``: a query sees keys of its own id alone.
    of_key: ids ``[B or 1, S]``.
    rank_of_query: ``[B or 1, T]``: of these, keys of this rank or a lower one.
    rank_of_key: ``[B or 1, S]``.
  """

  queries: Array
  keys: Array
  holds: Array
  of_query: Array | None = None
  of_key: Array | None = None
  rank_of_query: Array | None = None
  rank_of_key: Array | None = None


def known(x: Any) -> np.ndarray | Array:
  """A numpy array if the content can be looked at now, else `x`."""
  if isinstance(x, jax.core.Tracer):
    return x
  if isinstance(x, jax.Array):
    return np.asarray(jax.device_get(x)) if x.is_fully_addressable else x
  return np.asarray(x)


def numbers(x: Array) -> ModuleType:
  """The module whose functions serve x."""
  return np if isinstance(x, np.ndarray) else jnp


def read_mask(
  mask: Any, expected: tuple[int, ...], *, is_bool: bool
) -> tuple[Array, Array]:
  """Which keys a mask shows, and where its content can be trusted.

  Args:
    mask: broadcast against `expected`; of floats and integers those that are
      not zero show a key.
    expected: ``[batch..., N, T, S]``.
    is_bool: nothing but booleans is taken.

  Returns:
    Bool ``[B or 1, N or 1, T or 1, S]``, and bool ``[B or 1]``.
  """
  mask = known(mask)
  if is_bool and mask.dtype != np.bool_:
    raise ValueError(
      f"mask must be boolean (True = visible), got dtype {mask.dtype}; "
      f"{NOT_BOOLEAN}."
    )
  mask = _in_four_axes("mask", mask, expected)
  if not jnp.issubdtype(mask.dtype, jnp.floating):
    return mask != 0, numbers(mask).ones(1, bool)
  sound = (mask >= 0).all(axis=(1, 2, 3))
  if isinstance(sound, np.ndarray) and not sound.all():
    raise ValueError(
      f"mask (dtype {mask.dtype}) has negative entries: an additive mask goes "
      f"to bias=; else {NOT_BOOLEAN}."
    )
  return mask != 0, sound


def read_bias(bias: Any, expected: tuple[int, ...]) -> tuple[Array, Array]:
  """Likewise for an additive bias that is a mask: 0 shows, -inf hides."""
  bias = _in_four_axes("bias", known(bias), expected)
  sound = ((bias == 0) | (bias <= HIDDEN)).all(axis=(1, 2, 3))
  is_known = isinstance(sound, np.ndarray)
  if not sound.all() if is_known else bias.shape[1] > 1:
    raise ValueError(
      f"bias (of shape {bias.shape}) cannot be honoured by random-feature "
      "attention: there are no scores to add it to. Only a mask in the form of "
      "a bias can, the same for all heads: 0 where a key is seen, -inf or the "
      "least float where not."
    )
  return bias == 0, sound


def _in_four_axes(name: str, x: Array, expected: tuple[int, ...]) -> Array:
  """``[B or 1, N or 1, T or 1, S]`` of what broadcasts to `expected`."""
  shape = x.shape
  extra = len(shape) - len(expected)
  if extra > 0 and set(shape[:extra]) == {1}:
    shape = shape[extra:]
  shape = (1,) * (len(expected) - len(shape)) + shape
  if len(shape) != len(expected) or any(
    s not in (1, e) for s, e in zip(shape, expected, strict=True)
  ):
    raise ValueError(
      f"{name} must be broadcastable to [batch, heads, query length, key "
      f"length] = {list(expected)}, got {name}.shape={x.shape}; one over keys "
      f"[batch, key length] is {name}[:, None, None, :]."
    )
  xp, x = numbers(x), x.reshape(shape)
  *batch, heads, rows, _ = shape
  if any(size != 1 for size in batch):
    batch = expected[:-3]
  x = xp.broadcast_to(x, (*batch, heads, rows, expected[-1]))
  return x.reshape(math.prod(batch), heads, rows, expected[-1])


def product_form(seen: Array, is_causal: bool) -> Form:
  """Real queries times real keys, within the causal triangle if asked.

  Args:
    seen: bool ``[B or 1, T, S]``; within the triangle already.
    is_causal: there is one.
  """
  queries, keys = seen.any(axis=2), seen.any(axis=1)
  product = queries[:, :, None] & keys[:, None]
  if is_causal:
    product = product & triangle(*seen.shape[1:])[None]
  return Form(queries, keys, (product == seen).all(axis=(1, 2)))


def segment_form(seen: Array) -> Form:
  """Packed rows under the causal triangle, T == S: ids of positions.

  A segment is known by the first key that a query sees; that of a key is found
  through the first query that sees it.
  """
  xp = numbers(seen)
  queries, keys = seen.any(axis=2), seen.any(axis=1)
  first = seen.argmax(axis=2)
  of_key = xp.take_along_axis(first, seen.argmax(axis=1), axis=1)
  ids = xp.where(keys, of_key, first)
  visible = ids[:, :, None] == ids[:, None]
  visible = visible & triangle(*seen.shape[1:])[None]
  visible = visible & queries[:, :, None] & keys[:, None]
  return Form(queries, keys, (visible == seen).all(axis=(1, 2)), ids, ids)


def chain_form(seen: Array) -> Form:
  """Queries whose sets of keys are nested or disjoint, group by group.

  Packed rows, causal or not, a prefix that all see, keys of a cache. A group is
  known by a key that all its queries see; in it, a query of rank r sees the
  keys that some query of rank r or less sees, rank being the number of keys.
  """
  xp = numbers(seen)
  queries, keys = seen.any(axis=2), seen.any(axis=1)
  count, viewers = seen.sum(axis=2), seen.sum(axis=1)
  of_query = xp.where(seen, viewers[:, None], -1).argmax(axis=2)
  of_key = xp.take_along_axis(of_query, seen.argmax(axis=1), axis=1)
  most = seen.shape[2] + 1
  rank = xp.where(seen, count[:, :, None], most).min(axis=1)
  visible = of_query[:, :, None] == of_key[:, None]
  visible = visible & (rank[:, None] <= count[:, :, None])
  visible = visible & queries[:, :, None] & keys[:, None]
  holds = (visible == seen).all(axis=(1, 2))
  return Form(queries, keys, holds, of_query, of_key, count, rank)


def placed_form(seen: Array) -> Form:
  """Queries that stand at keys, and see the real ones up to there.

  `rank_of_query` is where: at the last key that it sees.
  """
  xp = numbers(seen)
  queries, keys = seen.any(axis=2), seen.any(axis=1)
  length = seen.shape[2]
  place = length - 1 - seen[:, :, ::-1].argmax(axis=2)
  position = xp.arange(length)[None, None]
  visible = (position <= place[:, :, None]) & keys[:, None]
  visible = visible & queries[:, :, None]
  holds = (visible == seen).all(axis=(1, 2))
  here = (position == place[:, :, None]) & queries[:, :, None]
  holds = holds & (here.sum(axis=1) <= 1).all(axis=1)
  return Form(queries, keys, holds, rank_of_query=place)


def triangle(num_queries: int, num_keys: int) -> np.ndarray:
  """Bool ``[T, S]``: query i sees keys 0..i."""
  return np.tri(num_queries, num_keys, dtype=bool)
