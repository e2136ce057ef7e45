"""Positions of tokens: numbers, sinusoids, and rotary embedding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.typing import Array

POSITIONS = ("learned", "sinusoidal", "rotary", "none")

# Wavelengths are from 2 pi to about 2 pi times this number of positions.
_FREQUENCY_BASE = 1e4


def next_positions(
  module: nn.Module,
  x: Array,
  mask: Array | None,
  segment_ids: Array | None,
  decode: bool,
) -> Array:
  """Returns the position of each token; while decoding, counts the tokens.

  Args:
    module: the module whose compact method calls this function. With `decode`,
      its variable "position" ``[B]`` in the collection "cache" counts the real
      tokens of all calls.
    x: ``[B, T, ...]``.
    mask: ``[B, T]``, True at real positions; None for all.
    segment_ids: ints ``[B, T]`` of packed rows, or None.
    decode: the tokens continue the sequences of earlier calls.

  Returns:
    int32 ``[T]`` or, if rows may differ, ``[B, T]``.
  """
  batch, length = x.shape[:2]
  index = jnp.arange(length, dtype=jnp.int32)
  if segment_ids is not None:
    return positions_in_segments(segment_ids)
  if not decode:
    return index
  count = module.variable(
    "cache", "position", lambda: jnp.zeros((batch,), jnp.int32)
  )
  start = count.value[:, None]
  if mask is None:
    index, new = index[None], jnp.int32(length)
  else:
    new = jnp.sum(mask, axis=1, dtype=jnp.int32)
    index = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
  if not module.is_initializing():  # `init` makes an empty cache
    count.value = count.value + new
  return start + index


def positions_in_segments(segment_ids: Array) -> Array:
  """Counts, for each position, the earlier positions of its segment.

  Args:
    segment_ids: ints ``[B, T]``, in any order.

  Returns:
    int32 ``[B, T]``.

  Example:
    >>> positions_in_segments(jnp.array([[7, 7, 7, 2, 2, 7]])).tolist()
    [[0, 1, 2, 0, 1, 3]]
  """
  order = jnp.argsort(segment_ids, axis=1, stable=True)
  ids = jnp.take_along_axis(segment_ids, order, axis=1)
  index = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
  starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
  first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
  # Undo the sort.
  return jnp.take_along_axis(index - first, jnp.argsort(order, axis=1), axis=1)


def sinusoids(length: int, size: int) -> Array:
  """Sinusoidal position embedding: sines, then cosines, of mean square 1.

  At position t, entries i and i + ceil(size/2) are ``sqrt(2)`` times sine and
  cosine of ``t * 1e4**(-i/ceil(size/2))``.

  Args:
    length: number of positions.
    size: of the embedding; if it is odd, the last cosine is left out.

  Returns:
    ``[length, size]`` float32.

  Example:
    >>> (100 * sinusoids(2, 2)).round().tolist()
    [[0.0, 141.0], [119.0, 76.0]]

  References:
    Vaswani et al., `Attention is all you need
    <https://arxiv.org/abs/1706.03762>`_, 2017, section 3.5. The code
    of Tay et al., "Long Range Arena", 2021, takes them as the initial value of
    a learned table.
  """
  half = -(-size // 2)
  frequency = _FREQUENCY_BASE ** (-np.arange(half) / half)
  angle = np.outer(np.arange(length), frequency)
  columns = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :size]
  return jnp.asarray(np.sqrt(2) * columns, jnp.float32)


def rotate(x: Array, positions: Array) -> Array:
  r"""Rotary position embedding of queries or keys.

  Rotates entries i and i + H/2, as a pair, by ``positions * 1e4**(-2i/H)``
  radians. So the product of a query at position t and a key at position s, and
  any exact kernel of the two, depends on t - s alone. An *estimate* of the
  kernel by random features does not: a shift of t and s acts as another draw of
  the weight matrix. Hence packed rows equal separate ones only if positions
  start at 0 in each segment.

  Args:
    x: ``[B, T, N, H]`` float, H even.
    positions: ``[T]`` or ``[B, T]``, ints or floats.

  Returns:
    ``[B, T, N, H]`` in x's dtype; angles are float32. Norms do not change.

  Raises:
    ValueError: H is odd.

  Example:
    >>> x = jnp.array([[[[1.0, 0.0]]]])
    >>> rotate(x, jnp.array([jnp.pi])).round(3).tolist()
    [[[[-1.0, -0.0]]]]

  References:
    Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021, equation
    15; the pairs are halves, not neighbours.
  """
  head_dim = x.shape[-1]
  if head_dim % 2:
    raise ValueError(f"rotary positions need an even head_dim, got {head_dim}.")
  half = head_dim // 2
  frequency = _FREQUENCY_BASE ** (-np.arange(half, dtype=np.float32) / half)
  angle = jnp.multiply.outer(positions.astype(jnp.float32), frequency)
  # ``[B or 1, T, 1, H/2]``.
  angle = angle[..., None, :].reshape(-1, x.shape[1], 1, half)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first = x[..., :half].astype(jnp.float32)
  second = x[..., half:].astype(jnp.float32)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
