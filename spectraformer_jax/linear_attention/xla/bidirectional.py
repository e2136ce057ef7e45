"""Queries that see every key: feature map and sums in one pass.

Sequences are cut into blocks. Features are made block by block and dropped
again, in the backward pass as well: what stays between the two is query, key,
value, the sums over keys and one exponent a query.
"""

import functools

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import derivatives, leaves
from spectraformer_jax.linear_attention.state import (
  FeatureFn,
  Maps,
  State,
  fixed,
  joined,
  parted,
)
from spectraformer_jax.linear_attention.varying import alike
from spectraformer_jax.linear_attention.xla import blocks, chunks
from spectraformer_jax.linear_attention.xla.products import (
  BACKWARD,
  FORWARD,
  PLAIN,
  Products,
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
  chunk: int | None,
) -> tuple[Array, State]:
  """Every query sees every visible key and the initial state.

  Args:
    maps: feature maps.
    constants: their variables.
    state: sums over keys that came before.
    query: ``[B, T, N, G, H]``.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    keep: bool ``[B, S]`` or None.
    chunk: positions in a block; None for what is best.

  Returns:
    ``[B, T, N, G, V]`` of value's dtype and the state after all keys.
  """
  state = accumulate(maps.key, chunk, constants, state, key, value, keep)
  out = read(maps.query, chunk, value.dtype, constants, state, query, 0)
  return out, state


def read(
  query_map: FeatureFn,
  chunk: int | None,
  dtype: jnp.dtype,
  constants: PyTree,
  state: State,
  query: Array,
  position: Array,
) -> Array:
  """Every query sees the state, block by block.

  Args:
    query_map: the feature map of queries.
    chunk: positions in a block; None for what is best.
    dtype: of the output.
    constants: variables of the map.
    state: sums over all keys.
    query: ``[B, T, N, G, H]``.
    position: of the first query.

  Returns:
    ``[B, T, N, G, V]``.
  """
  run = derivatives.with_backward(
    *(
      functools.partial(function, query_map, chunk, dtype)
      for function in (_read_forward, _read_backward, _read_plain)
    )
  )
  inputs = alike(constants, fixed(joined(state)), query)
  return run(*inputs, jnp.asarray(position))


def _read_forward(query_map, chunk, dtype, *inputs):
  """`read` of a state whose sums are joined, and what is kept."""
  out, found = _read_blocks(query_map, chunk, dtype, FORWARD, *inputs)
  return out, (out, found)


def _read_plain(query_map, chunk, dtype, *inputs):
  return _read_blocks(query_map, chunk, dtype, PLAIN, *inputs)[0]


def _read_blocks(
  query_map,
  chunk,
  dtype,
  products: Products,
  constants,
  state,
  query,
  position,
):
  """The output, and normalizers and largest exponents of each block."""
  length = query.shape[1]
  cut = blocks.best_cut(chunk, query.shape)
  padded = blocks.pad(blocks.flat(query), cut.length)

  def step(out, index):
    place = cut.place(index)
    found = chunks.read(
      query_map,
      *cut.rows((constants, state), place),
      cut.queries(padded, place),
      position + place.position,
      products=products,
    )
    return cut.write(out, found.out, place), found._replace(out=None)

  out = blocks.empty_like(padded, state.kv.shape[-1] - 1, dtype)
  out, found = jax.lax.scan(products.step(step), out, cut.indices())
  return out[:, :length].reshape(*query.shape[:-1], -1), found


def _read_backward(query_map, chunk, dtype, inputs, kept, gradient):
  """Blocks are independent; what they say of the state is added up."""
  del dtype
  (constants, state, query, position), (out, every) = inputs, kept
  length = query.shape[1]
  cut = blocks.best_cut(chunk, query.shape)
  padded, gradient, out = (
    blocks.pad(blocks.flat(x), cut.length) for x in (query, gradient, out)
  )

  def step(carry, x):
    total, d_query = carry
    index, found = x
    place = cut.place(index)
    found = found._replace(out=cut.queries(out, place))
    d_out = cut.queries(gradient, place).astype(jnp.float32)
    queries, found = chunks.unless_unused(
      cut.queries(padded, place), found, d_out
    )
    own_constants, own_state = cut.rows((constants, state), place)
    _, pull = jax.vjp(
      lambda floats, sums, queries: (
        chunks.read(
          query_map,
          leaves.with_floats(own_constants, floats),
          leaves.with_sums(own_state, sums),
          queries,
          position + place.position,
          BACKWARD,
          found,
        ).out
      ),
      leaves.floats(own_constants),
      leaves.sums(own_state),
      queries,
    )
    *pulled, d_block = pull(d_out)
    total = cut.add_to_rows(total, tuple(pulled), place)
    return (total, cut.write(d_query, d_block, place)), None

  zeros = jax.tree.map(
    jnp.zeros_like, (leaves.floats(constants), leaves.sums(state))
  )
  carry = zeros, blocks.empty_like(padded)
  ((d_floats, d_sums), d_query), _ = jax.lax.scan(
    step, carry, (cut.indices(), every)
  )
  return (
    leaves.gradient_of_constants(constants, d_floats),
    leaves.gradient_of_state(state, d_sums),
    d_query[:, :length].reshape(query.shape),
    None,
  )


def _cut_keys(chunk: int | None, key, value, keep):
  """The cut of keys, and keys, values and mask padded to it."""
  cut = blocks.best_cut(chunk, key.shape)
  if keep is None and cut.length != key.shape[1]:
    keep = jnp.ones(key.shape[:2], bool)
  return cut, tuple(blocks.pad(x, cut.length) for x in (key, value, keep))


def accumulate(
  key_map: FeatureFn,
  chunk: int | None,
  constants: PyTree,
  state: State,
  key: Array,
  value: Array,
  keep: Array | None,
) -> State:
  """The state after all keys, block by block.

  Args:
    key_map: the feature map of keys.
    chunk: positions in a block; None for what is best.
    constants: variables of the map.
    state: sums over keys that came before.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    keep: bool ``[B, S]`` or None.
  """
  run = derivatives.with_backward(
    *(
      functools.partial(function, key_map, chunk)
      for function in (_sum_forward, _sum_backward, _sum_plain)
    )
  )
  inputs = (constants, fixed(joined(state)), key, value, keep)
  return parted(run(*alike(*inputs)))


def _sum_forward(key_map, chunk, *inputs):
  """`accumulate` with joined sums, and what is kept."""
  state = _sum_blocks(key_map, chunk, FORWARD, *inputs)
  return state, state.exponent


def _sum_plain(key_map, chunk, *inputs):
  return _sum_blocks(key_map, chunk, PLAIN, *inputs)


def _sum_blocks(
  key_map, chunk, products: Products, constants, state, key, value, keep
):
  length, start = key.shape[1], state.length
  cut, padded = _cut_keys(chunk, key, value, keep)

  def step(state, index):
    place = cut.place(index)
    own = chunks.add_keys(
      key_map,
      *cut.rows((constants, state), place),
      *cut.keys(*padded, place, start),
      products=products,
    )
    return cut.write_rows(state, own, place), None

  state = jax.lax.scan(products.step(step), state, cut.indices())[0]
  return state._replace(length=start + length)


def _sum_backward(key_map, chunk, inputs, exponent, gradient):
  """Each block contributes a sum of its own, so blocks are independent."""
  constants, state, key, value, keep = inputs
  length = key.shape[1]
  cut, padded = _cut_keys(chunk, key, value, keep)
  # Relative to the final exponent, the state enters and leaves linearly.
  empty = jax.tree.map(jnp.zeros_like, state)._replace(exponent=exponent)

  def step(carry, index):
    total, d_key, d_value = carry
    place = cut.place(index)
    k, v, *where = cut.keys(*padded, place, state.length)
    own_constants, own_empty, own_gradient = cut.rows(
      (constants, empty, leaves.sums(gradient)), place
    )
    _, pull = jax.vjp(
      lambda floats, k, v: leaves.sums(
        chunks.add_keys(
          key_map,
          leaves.with_floats(own_constants, floats),
          own_empty,
          *(k, v, *where),
          BACKWARD,
          is_final=True,
        )
      ),
      leaves.floats(own_constants),
      k,
      v,
    )
    d_floats, d_k, d_v = pull(own_gradient)
    return (
      cut.add_to_rows(total, d_floats, place),
      cut.write(d_key, d_k, place),
      cut.write(d_value, d_v, place),
    ), None

  zeros = jax.tree.map(jnp.zeros_like, leaves.floats(constants))
  carry = zeros, *map(blocks.empty_like, padded[:2])
  (d_floats, d_key, d_value), _ = jax.lax.scan(step, carry, cut.indices())
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
