"""Sequences in blocks of positions: sizes, padding, reading and writing one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array


class Sizes(NamedTuple):
  """What is best on a backend.

  Attributes:
    chunk: positions of a causal chunk. Its masked product costs C (F + V) a
      token and the state F V, so C near V is cheapest on a CPU; matrix units
      want more rows.
    step: positions of all rows (examples and heads) in a causal step, which
      takes one chunk or more. Below, launching its programs costs as much as
      they do; on a CPU a single chunk stays in the cache.
    stride: steps between two states that are kept for the backward pass. With
      the large chunks of a TPU its compiler plans less memory where all are.
    block: positions of all rows in a block of what sees every key: features of
      a block should stay in the cache.
  """

  chunk: int
  step: int
  stride: int
  block: int


SIZES = {
  "cpu": Sizes(chunk=64, step=0, stride=16, block=2048),
  "gpu": Sizes(chunk=128, step=16384, stride=16, block=16384),
  "tpu": Sizes(chunk=256, step=16384, stride=1, block=16384),
}


def sizes() -> Sizes:
  """Those of the backend in use."""
  return SIZES.get(jax.default_backend(), SIZES["gpu"])


def block_size(chunk: int | None, key: Array) -> int:
  """Positions in a block of keys ``[B, S, N, H]``: what is asked, or best."""
  best = sizes()
  return chunk or max(best.chunk, best.block // (key.shape[0] * key.shape[2]))


def step_size(chunk: int | None, key: Array) -> tuple[int, int]:
  """Positions in a causal chunk, and chunks in a step: one if it is asked."""
  if chunk:
    return chunk, 1
  best = sizes()
  rows = key.shape[0] * key.shape[2]
  return best.chunk, max(1, best.step // (rows * best.chunk))


def pad(x: Array | None, multiple: int, mode: str = "constant"):
  """Pads axis 1 to a multiple; None stays None."""
  if x is None:
    return None
  padding = -x.shape[1] % multiple
  if not padding:
    return x
  widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths, mode=mode)


def take(x: Array, index, size: int) -> Array:
  """Block `index` of axis 1."""
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def blocks_of_keys(key, value, keep, chunk: int):
  """Padded keys, values and mask, and the block size."""
  size = min(chunk, key.shape[1])
  if key.shape[1] % size and keep is None:
    keep = jnp.ones(key.shape[:2], bool)
  return pad(key, size), pad(value, size), pad(keep, size), size


def key_block(key, value, keep, index, size: int, start):
  """Keys and values ``[B, N, C, .]`` of a block, its position and mask."""
  block_key, block_value = (
    jnp.swapaxes(take(x, index, size), 1, 2) for x in (key, value)
  )
  if keep is not None:
    keep = take(keep, index, size)[:, None, :, None]
  return block_key, block_value, start + index * size, keep


def flat(query: Array) -> Array:
  """``[B, T, N, G, H] -> [B, T, N G, H]``, as loops should take it.

  For the layout of an axis of size 1, like G, XLA would copy all of it.
  """
  return query.reshape(*query.shape[:2], -1, query.shape[-1])


def query_block(query: Array, heads: int, index, size: int) -> Array:
  """Block `index` of ``[B, T, N G, H]``, as ``[B, N, G, C, H]``."""
  block = take(query, index, size)
  block = block.reshape(*block.shape[:2], heads, -1, block.shape[-1])
  return jnp.moveaxis(block, 1, 3)


def empty(query: Array, value_dim: int, dtype) -> Array:
  """Zeros ``[B, T, N G, V]`` for the outputs of `query`."""
  return jnp.zeros((*query.shape[:-1], value_dim), dtype)


def write(whole: Array, block: Array, index) -> Array:
  """``[B, T, N (G), V]`` with block ``[B, N, (G,) C, V]`` number `index`.

  In a loop's carry the block is written in place, in the caller's own layout:
  stacked blocks would need a second buffer and a transposition.
  """
  block = jnp.moveaxis(block, -2, 1).astype(whole.dtype)
  block = block.reshape(*block.shape[:2], *whole.shape[2:])
  return jax.lax.dynamic_update_slice_in_dim(
    whole, block, index * block.shape[1], axis=1
  )
