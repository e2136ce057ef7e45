"""The choice of sinks and of heavy keys, and the arrays that hold them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.typing import Array, Mask


class SpecialKeys(NamedTuple):
  """Sinks and heavy keys, which are exact for queries at any distance.

  All queries share them. In packed rows each query has those of its segment, so
  that the arrays have an axis of queries: ``[B, T, N, P, ...]``.

  Attributes:
    key: ``[B, N, P, H]``.
    value: ``[B, N, P, V]``.
    position: of each key, float32 ``[B, N or 1, P]``; -1 for keys from a state
      and HIDDEN for a place without a key. In packed rows ``[B, T, 1, P]``: 0,
      or HIDDEN for a key that the query does not see.
  """

  key: Array
  value: Array
  position: Array


class Choice(NamedTuple):
  """Which keys of a call without segments are sinks or heavy.

  Attributes:
    sinks: positions, int32 ``[B, P]``; S for a place without a sink.
    heavy: positions, int32 ``[B, N, P]``; S for a place without a heavy key.
      None if no heavy keys are chosen.
    is_rest: bool ``[B, S]``, or ``[B, S, N]`` if heavy keys are chosen: the
      visible keys that are neither.
  """

  sinks: Array
  heavy: Array | None
  is_rest: Array


# The position of a key that no query sees: larger than every other one.
HIDDEN = 2.0**30


def choose(
  exact: ExactKeys,
  kernel: str,
  x: Array,
  y: Array,
  query_mask: Mask,
  visible: Array,
  count_before: Array | int = 0,
) -> Choice:
  """Chooses sinks, and heavy keys among all others.

  Args:
    exact: how many.
    kernel: "softmax" or "gaussian".
    x: scaled queries ``[B, T, N, G, H]``, float32.
    y: scaled keys ``[B, S, N, H]``, float32.
    query_mask: ``[B, T]`` bool, or None: queries that count.
    visible: ``[B, S]`` bool: keys that count.
    count_before: visible keys before the first position, ``[B, 1]`` or int.
  """
  rank = rank_of_visible(visible, None, count_before)
  is_sink = visible & (rank < exact.num_sinks)
  sinks = sink_positions(is_sink, rank, exact.num_sinks)
  is_rest = visible & ~is_sink
  if not exact.num_heavy:
    return Choice(sinks, None, is_rest)
  score = heavy_score(x, y, query_mask, is_rest, kernel)
  heavy, is_heavy = heavy_positions(score, is_rest, exact.num_heavy)
  return Choice(sinks, heavy, is_rest[..., None] & ~is_heavy)


def rank_of_visible(
  visible: Array, segment: Array | None, count_before: Array | int = 0
) -> Array:
  """Returns the number of earlier visible keys of the segment, ``[B, S]``.

  Args:
    visible: bool ``[B, S]``.
    segment: ids ``[B, S]``, equal ones beside each other; None: one segment.
    count_before: visible keys before the first position, ``[B, 1]`` or int.
  """
  seen = visible.astype(jnp.int32)
  before = jnp.cumsum(seen, axis=1, dtype=jnp.int32) - seen + count_before
  if segment is None:
    return before
  first = first_of_segment(segment)
  return before - jnp.take_along_axis(before, first, axis=1)


def first_of_segment(segment: Array) -> Array:
  """Returns the first position of each position's segment, ``[B, S]``."""
  place = jnp.arange(segment.shape[1])[None]
  before = jnp.concatenate([segment[:, :1], segment[:, :-1]], axis=1)
  is_first = (before != segment) | (place == 0)
  starts = jnp.where(is_first, place, 0)
  return jax.lax.cummax(starts, axis=1)


def sink_positions(is_sink: Array, rank: Array, num_sinks: int) -> Array:
  """Returns the position of the sink of each rank, ``[B, P]``.

  Args:
    is_sink: bool ``[B, S]``.
    rank: from `rank_of_visible`, one segment.
    num_sinks: P.

  Returns:
    int32; S where no new key has that rank.
  """
  length = is_sink.shape[1]
  place = jnp.arange(length, dtype=jnp.int32)[None, :, None]
  is_rank = rank[..., None] == jnp.arange(num_sinks)[None, None]
  is_it = is_sink[..., None] & is_rank
  return jnp.min(jnp.where(is_it, place, length), axis=1)


def packed_sink_positions(
  is_sink: Array, segment: Array, num_sinks: int
) -> Array:
  """Returns for each position the sinks of its segment, int32 ``[B, T, P]``.

  Args:
    is_sink: bool ``[B, T]``.
    segment: ids ``[B, T]``, equal ones beside each other.
    num_sinks: P.

  Returns:
    Positions in order; T where the segment has fewer sinks.
  """
  length = segment.shape[1]
  one_each = is_sink.astype(jnp.int32)
  count = jnp.cumsum(one_each, axis=1, dtype=jnp.int32)
  first = first_of_segment(segment)
  before = jnp.take_along_axis(count - one_each, first, axis=1)
  wanted = before[..., None] + jnp.arange(1, num_sinks + 1)[None, None]
  find = jax.vmap(jnp.searchsorted)
  position = find(count, wanted.reshape(len(count), -1)).reshape(wanted.shape)
  inside = jnp.minimum(position, length - 1)
  take = jax.vmap(lambda segment, index: segment[index])
  same = take(segment, inside) == segment[..., None]
  return jnp.where(same & (position < length), position, length)


def heavy_positions(
  score: Array, is_candidate: Array, num_heavy: int
) -> tuple[Array, Array]:
  """Returns the keys with the largest scores.

  Args:
    score: ``[B, N, S]``.
    is_candidate: bool ``[B, S]``.
    num_heavy: P.

  Returns:
    Positions ``[B, N, P]``, of equal scores the lower first, S where there is
    no candidate; and which keys they are, bool ``[B, S, N]``.
  """
  length = score.shape[2]
  score = jnp.where(is_candidate[:, None], score, -jnp.inf)
  # `top_k` needs `num_heavy` scores. The padding is always added, since a
  # length that is a symbol cannot be compared with a number.
  score = jnp.pad(
    score, [(0, 0), (0, 0), (0, num_heavy)], constant_values=-jnp.inf
  )
  top, position = jax.lax.top_k(score, num_heavy)
  position = jnp.where(top > -jnp.inf, position, length)
  # An index array for the batch would gather all examples of a mesh.
  mark = lambda position: (
    jnp.zeros(length, bool).at[position].set(True, mode="drop")
  )
  is_heavy = jnp.swapaxes(jax.vmap(jax.vmap(mark))(position), 1, 2)
  return position, is_heavy


def heavy_score(
  x: Array, y: Array, query_mask: Mask, key_mask: Array, kernel: str
) -> Array:
  r"""Returns the logarithm of the attention that each key is likely to get.

  For queries N(m, a) and keys N(c, b) with diagonal covariances, the logarithm
  of the expected weight of key y, up to a term that all keys share, is

  .. math:: h = \sum_d \frac{m_d u_d + a_d u_d^2 / 2}{1 + a_d b_d},
    \quad u = y - c

  for the softmax kernel. The Gaussian one has c / (1 + b) and b / (1 + b) in
  place of c and b, and the term :math:`-|y|^2 / 2`.

  Args:
    x: scaled queries ``[B, T, N, G, H]``, float32.
    y: scaled keys ``[B, S, N, H]``, float32.
    query_mask: ``[B, T]`` bool, or None: queries that count.
    key_mask: ``[B, S]`` bool: keys that count.
    kernel: "softmax" or "gaussian".

  Returns:
    ``[B, N, S]`` float32, without gradient.
  """
  x, y = jax.lax.stop_gradient((x, y))
  batch, _, heads, _, depth = x.shape
  if query_mask is None:
    query_mask = jnp.ones(x.shape[:2], bool)
  query_mask &= jnp.all(jnp.isfinite(x), axis=(2, 3, 4))
  m, a = _mean_and_variance(x, query_mask[:, :, None, None, None], (1, 3))
  c, b = _mean_and_variance(y, key_mask[:, :, None, None], (1,))
  if kernel == "gaussian":
    c, b = c / (1.0 + b), b / (1.0 + b)
  as_keys = lambda moment: moment.reshape(batch, 1, heads, depth)
  m, a, c, b = map(as_keys, (m, a, c, b))
  u = y - c
  terms = (m * u + 0.5 * a * jnp.square(u)) / (1.0 + a * b)
  if kernel == "gaussian":
    terms -= 0.5 * jnp.square(y)
  return jnp.swapaxes(jnp.sum(terms, axis=-1), 1, 2)


def _mean_and_variance(
  x: Array, mask: Array, axes: tuple[int, ...]
) -> tuple[Array, Array]:
  """Returns mean and variance of x over axes (kept), where `mask` is True."""
  mask = jnp.broadcast_to(mask, x.shape)
  x = jnp.where(mask, x, 0.0)
  count = jnp.sum(mask.astype(jnp.float32), axis=axes, keepdims=True)
  count = jnp.maximum(count, 1.0)
  mean = jnp.sum(x, axis=axes, keepdims=True) / count
  square = jnp.where(mask, jnp.square(x - mean), 0.0)
  return mean, jnp.sum(square, axis=axes, keepdims=True) / count
