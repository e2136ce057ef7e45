"""Queries that see every key: feature map and sums in one pass.

Sequences are cut into blocks. Features are made block by block and dropped
again, in the backward pass as well: what stays between the two is query, key,
value, the sums over keys and one exponent a query.
"""

import functools

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import blocks, chunks, leaves
from spectraformer_jax.linear_attention.state import (
  FeatureFn,
  Maps,
  State,
  joined,
  parted,
)
from spectraformer_jax.typing import Array, PyTree


def bidirectional(
  maps: Maps,
  constants: PyTree,
  state: State,
  query: Array,
  key: Array,
  value: Array,
  keep: Array | None,
  *,
  chunk: int,
) -> tuple[Array, State]:
  """Every query sees every visible key and the initial state.

  Args:
    maps: feature maps.
    constants: their variables.
    state: sums over keys that came before.
    query: ``[B, T, N, G, H]``.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]`` float32.
    keep: bool ``[B, S]`` or None.
    chunk: positions in a block.

  Returns:
    ``[B, T, N, G, V]`` and the state after all keys.
  """
  state = accumulate(maps.key, chunk, constants, state, key, value, keep)
  return read(maps.query, chunk, constants, state, query, 0), state


def read(
  query_map: FeatureFn,
  chunk: int,
  constants: PyTree,
  state: State,
  query: Array,
  position: Array,
) -> Array:
  """Every query sees the state, block by block.

  Args:
    query_map: the feature map of queries.
    chunk: positions in a block.
    constants: variables of the map.
    state: sums over all keys.
    query: ``[B, T, N, G, H]``.
    position: of the first query.

  Returns:
    ``[B, T, N, G, V]``.
  """
  return _read(query_map, chunk, constants, joined(state), query, position)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read(query_map, chunk, constants, state, query, position):
  """`read` of a state whose sums are joined."""
  return _read_blocks(query_map, chunk, constants, state, query, position)[0]


def _read_blocks(query_map, chunk, constants, state, query, position):
  """The output, and normalizers and largest exponents of each block."""
  length, heads = query.shape[1:3]
  size = min(chunk, length)
  padded = blocks.pad(blocks.flat(query), size)

  def step(out, index):
    block = blocks.query_block(padded, heads, index, size)
    where = position + index * size
    found = chunks.read(query_map, constants, state, block, where)
    return blocks.write(out, found.out, index), found._replace(out=None)

  out = blocks.empty(padded, state.kv.shape[-1] - 1, state.kv.dtype)
  count = jnp.arange(padded.shape[1] // size)
  out, found = jax.lax.scan(step, out, count)
  return out[:, :length].reshape(*query.shape[:-1], -1), found


def _read_fwd(query_map, chunk, constants, state, query, position):
  out, found = _read_blocks(query_map, chunk, constants, state, query, position)
  return out, (constants, state, query, position, out, found)


def _read_bwd(query_map, chunk, residuals, gradient):
  """Blocks are independent; what they say of the state is added up."""
  constants, state, query, position, out, every = residuals
  length, heads = query.shape[1:3]
  size = min(chunk, length)
  padded, gradient, out = (
    blocks.pad(blocks.flat(x), size) for x in (query, gradient, out)
  )

  def step(carry, x):
    total, d_query = carry
    index, found = x
    found = found._replace(out=blocks.query_block(out, heads, index, size))
    _, pull = jax.vjp(
      lambda floats, sums, block: (
        chunks.read(
          query_map,
          leaves.with_floats(constants, floats),
          leaves.with_sums(state, sums),
          block,
          position + index * size,
          found,
        ).out
      ),
      leaves.floats(constants),
      leaves.sums(state),
      blocks.query_block(padded, heads, index, size),
    )
    *pulled, d_block = pull(blocks.query_block(gradient, heads, index, size))
    total = leaves.tree_add(total, tuple(pulled))
    return (total, blocks.write(d_query, d_block, index)), None

  zeros = jax.tree.map(
    jnp.zeros_like, (leaves.floats(constants), leaves.sums(state))
  )
  carry = zeros, jnp.zeros_like(padded)
  count = jnp.arange(padded.shape[1] // size)
  ((d_floats, d_sums), d_query), _ = jax.lax.scan(step, carry, (count, every))
  return (
    leaves.gradient_of_constants(constants, d_floats),
    leaves.gradient_of_state(state, d_sums),
    d_query[:, :length].reshape(query.shape),
    leaves.no_gradient(jnp.asarray(position)),
  )


_read.defvjp(_read_fwd, _read_bwd)


def accumulate(
  key_map: FeatureFn,
  chunk: int,
  constants: PyTree,
  state: State,
  key: Array,
  value: Array,
  keep: Array | None,
) -> State:
  """The state after all keys, block by block.

  Args:
    key_map: the feature map of keys.
    chunk: positions in a block.
    constants: variables of the map.
    state: sums over keys that came before.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]`` float32.
    keep: bool ``[B, S]`` or None.
  """
  state = joined(state)
  return parted(_accumulate(key_map, chunk, constants, state, key, value, keep))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _accumulate(key_map, chunk, constants, state, key, value, keep):
  """`accumulate` with joined sums."""
  length = key.shape[1]
  key, value, keep, size = blocks.blocks_of_keys(key, value, keep, chunk)
  start = state.length

  def step(state, index):
    block = blocks.key_block(key, value, keep, index, size, start)
    return chunks.add_keys(key_map, constants, state, *block), None

  count = jnp.arange(key.shape[1] // size)
  state = jax.lax.scan(step, state, count)[0]
  return state._replace(length=start + length)


def _accumulate_fwd(key_map, chunk, constants, state, key, value, keep):
  out = _accumulate(key_map, chunk, constants, state, key, value, keep)
  return out, (constants, state, key, value, keep, out.exponent)


def _accumulate_bwd(key_map, chunk, residuals, gradient):
  """Each block contributes a sum of its own, so blocks are independent."""
  constants, state, key, value, keep, exponent = residuals
  padded = blocks.blocks_of_keys(key, value, keep, chunk)
  length, size = key.shape[1], padded[3]
  # Relative to the final exponent, the state enters and leaves linearly.
  empty = jax.tree.map(jnp.zeros_like, state)._replace(exponent=exponent)

  def step(carry, index):
    total, d_key, d_value = carry
    k, v, *where = blocks.key_block(*padded[:3], index, size, state.length)
    _, pull = jax.vjp(
      lambda floats, k, v: leaves.sums(
        chunks.add_keys(
          key_map,
          leaves.with_floats(constants, floats),
          empty,
          *(k, v, *where),
          is_final=True,
        )
      ),
      leaves.floats(constants),
      k,
      v,
    )
    d_floats, d_k, d_v = pull(leaves.sums(gradient))
    total = leaves.tree_add(total, d_floats)
    return (
      total,
      blocks.write(d_key, d_k, index),
      blocks.write(d_value, d_v, index),
    ), None

  carry = jax.tree.map(jnp.zeros_like, (leaves.floats(constants), *padded[:2]))
  count = jnp.arange(padded[0].shape[1] // size)
  (d_floats, d_key, d_value), _ = jax.lax.scan(step, carry, count)
  _, pull = jax.vjp(
    lambda sums: leaves.sums(
      chunks.rescale(leaves.with_sums(state, sums), exponent)
    ),
    leaves.sums(state),
  )
  return (
    leaves.gradient_of_constants(constants, d_floats),
    leaves.gradient_of_state(state, *pull(leaves.sums(gradient))),
    d_key[:, :length],
    d_value[:, :length],
    None,
  )


_accumulate.defvjp(_accumulate_fwd, _accumulate_bwd)
