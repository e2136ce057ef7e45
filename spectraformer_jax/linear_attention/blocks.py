"""Sequences in blocks of positions: sizes, padding, reading and writing one."""

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array

# Default chunk sizes. In the causal form the masked product costs C (F + V)
# per token and the state F V, so C near V is cheapest on a CPU; matrix units
# want more rows.
CAUSAL_CHUNK = {"cpu": 64, "gpu": 128, "tpu": 256}
# A step of the causal form takes so many positions of all rows (examples and
# heads), in one chunk or more: below, launching its programs costs as much as
# they do. On a CPU smaller ones stay in the cache.
STEP_POSITIONS = {"cpu": 0, "gpu": 4096, "tpu": 4096}
# Steps between two states that are kept for the backward pass. With the large
# chunks of a TPU its compiler plans less memory where none is made again.
STRIDE = {"cpu": 16, "gpu": 16, "tpu": 1}
# Without a mask larger blocks cost nothing until features leave the cache: on a
# CPU all rows (examples and heads) of a block have this many positions.
CPU_POSITIONS = 2048
BLOCK = 1024


def default_chunk(is_causal: bool, key: Array) -> int:
  """A good chunk size for the backend in use and keys ``[B, S, N, H]``."""
  backend = jax.default_backend()
  if is_causal:
    return CAUSAL_CHUNK.get(backend, CAUSAL_CHUNK["gpu"])
  if backend == "cpu":
    return max(64, min(BLOCK, CPU_POSITIONS // (key.shape[0] * key.shape[2])))
  return BLOCK


def default_stride() -> int:
  """How often a state is kept on the backend in use."""
  return STRIDE.get(jax.default_backend(), STRIDE["gpu"])


def chunks_at_once(chunk: int, key: Array) -> int:
  """How many chunks of keys ``[B, S, N, H]`` a causal step takes."""
  backend = jax.default_backend()
  positions = STEP_POSITIONS.get(backend, STEP_POSITIONS["gpu"])
  return max(1, positions // (key.shape[0] * key.shape[2] * chunk))


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
