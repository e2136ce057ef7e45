"""Local attention: exact attention inside blocks of positions."""

import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.baselines.masked import masked_inputs
from spectraformer_jax.kernels import masked_softmax
from spectraformer_jax.registry import check_int
from spectraformer_jax.typing import Array


def local_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  block_size: int = 64,
  neighbours: int = 0,
  scale: float | None = None,
  is_causal: bool = False,
  key_mask: Array | None = None,
) -> Array:
  """Softmax attention to the keys of the query's own block, O(T W).

  This is the "local attention" of Long Range Arena. It equals exact attention
  if one block holds all T positions.

  Args:
    query: ``[B, T, N, H]``, any float dtype.
    key: ``[B, T, N, H]``.
    value: ``[B, T, N, V]``.
    block_size: W; blocks begin at position 0.
    neighbours: number of visible blocks on each side of the query's own block.
    scale: None means ``1 / sqrt(H)``.
    is_causal: query i sees no key after i.
    key_mask: ``[B, T]`` bool, True at real positions.

  Returns:
    ``[B, T, N, V]`` in value's dtype, computed in float32 at least. A query
    that sees no key gives zeros.

  Raises:
    ValueError: shapes that do not agree, or sizes out of range.

  Example:
    >>> q = jnp.ones((1, 6, 2, 4))
    >>> local_attention(q, q, q, block_size=4).shape
    (1, 6, 2, 4)

  References:
    Parmar et al., `Image Transformer <https://arxiv.org/abs/1802.05751>`_,
    2018, section 3.2 (blocks and their memory); Tay et al., `Long Range Arena
    <https://arxiv.org/abs/2011.04006>`_, 2021, section 3.2.
  """
  checks.check_positive_int("block_size", block_size)
  check_int("neighbours", neighbours, 0)
  x, y, v, mask = masked_inputs(
    query, key, value, scale=scale, key_mask=key_mask, is_causal=is_causal
  )
  length = query.shape[1]
  num_blocks = max(1, -(-length // block_size))
  # More neighbours than blocks would only add padding.
  before = min(neighbours, num_blocks - 1)
  after = 0 if is_causal else before

  def blocks(array: Array) -> Array:
    """Pads with zeros and cuts: ``[B, T, ...] -> [B, blocks, W, ...]``."""
    extra = num_blocks * block_size - length
    pad = ((0, 0), (0, extra)) + ((0, 0),) * (array.ndim - 2)
    shape = (array.shape[0], num_blocks, block_size, *array.shape[2:])
    return jnp.pad(array, pad).reshape(shape)

  def windows(array: Array) -> Array:
    """Adds neighbours: ``[B, blocks, W, ...] -> [B, blocks, visible, ...]``."""
    pad = ((0, 0), (before, after)) + ((0, 0),) * (array.ndim - 2)
    wide = jnp.pad(array, pad)
    shifted = range(before + 1 + after)
    return jnp.concatenate(
      [wide[:, i : i + num_blocks] for i in shifted], axis=2
    )

  x = blocks(x)
  y, v, visible = (windows(blocks(array)) for array in (y, v, mask))
  visible = visible[:, :, None, None, :]
  if is_causal:
    # Positions from the start of the query's block.
    queries = jnp.arange(block_size)
    keys = jnp.arange((before + 1) * block_size) - before * block_size
    causal = keys[None, :] <= queries[:, None]
    visible = visible & causal[None, None, None]
  scores = jnp.einsum("bgtnh,bgsnh->bgnts", x, y, precision="highest")
  weights = masked_softmax(scores, visible)
  out = jnp.einsum("bgnts,bgsnv->bgtnv", weights, v, precision="highest")
  out = out.reshape(out.shape[0], num_blocks * block_size, *out.shape[3:])
  return out[:, :length].astype(value.dtype)
