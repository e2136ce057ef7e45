r"""Queries that see every key: feature map and sums in one pass.

With features phi of queries and psi of keys:

.. math::
  o_i = \frac{\phi_i \cdot S}{\phi_i \cdot z},
  \quad S = \sum_j \psi_j v_j^\top, \quad z = \sum_j \psi_j

`accumulate` computes S and z, which are one array (`chunks`), and `read`
computes o. Both go through the sequence in blocks.

Features of the whole sequence never exist at once: each block computes its own,
and the backward pass computes them again. The backward pass gets query, key,
value, output, S and z, and two numbers per query.
"""

import functools

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import derivatives, leaves
from spectraformer_jax.linear_attention.inputs import Call, KeyArrays
from spectraformer_jax.linear_attention.platforms import current_platform
from spectraformer_jax.linear_attention.state import (
  JoinedState,
  Linear,
  State,
  join_sums,
  rescale,
  split_sums,
)
from spectraformer_jax.linear_attention.varying import alike
from spectraformer_jax.linear_attention.xla import blocks, chunks
from spectraformer_jax.linear_attention.xla.chunks import Engine, Saved
from spectraformer_jax.linear_attention.xla.plan import plan_blocks
from spectraformer_jax.linear_attention.xla.products import EXACT, FAST
from spectraformer_jax.typing import Array, PyTree

# The gradients of a backward loop so far. Over keys: of constants, key and
# value. Over queries: of constants, sums and query.
_KeyGradients = tuple[list[Array], Array, Array]
_QueryGradients = tuple[tuple[list[Array], Linear], Array]


def accumulate(call: Call) -> State:
  """Returns the state after all keys; queries are not used."""
  inputs = call.inputs
  cut = cut_of(inputs.key, call.chunk_size)
  engine = Engine(call.maps, FAST, cut.size)
  run = derivatives.with_backward(
    functools.partial(sum_keys, cut, engine),
    functools.partial(sum_backward, cut, engine),
    functools.partial(sum_keys, cut, engine._replace(products=EXACT)),
  )
  return split_sums(
    run(*alike(call.constants, join_sums(call.state), inputs.keys))
  )


def sum_keys(
  cut: blocks.Blocks,
  engine: Engine,
  constants: PyTree,
  state: JoinedState,
  keys: KeyArrays,
) -> tuple[JoinedState, Array]:
  """Returns the state after all keys; the backward pass gets its exponent."""
  start, length = state.length, keys[0].shape[1]
  padded = blocks.pad_keys(keys, cut.length)

  def step(state: JoinedState, index: Array) -> tuple[JoinedState, None]:
    place = cut.place(index)
    block = cut.take_keys(padded, place, start)
    of_heads = cut.take_heads((constants, state), place)
    return cut.write_heads(
      state, chunks.add_keys(engine, *of_heads, block), place
    ), None

  state, _ = jax.lax.scan(
    engine.products.checkpoint(step), state, cut.indices()
  )
  return state._replace(length=start + length), state.exponent


def sum_backward(
  cut: blocks.Blocks,
  engine: Engine,
  primals: tuple[PyTree, JoinedState, KeyArrays],
  exponent: Array,
  gradient: JoinedState,
) -> tuple[PyTree, JoinedState, KeyArrays]:
  """Computes gradients block by block.

  Each block adds its own sums to the final ones. Relative to the final exponent
  the sums of a block need no rescaling, so blocks are independent.
  """
  constants, state, keys = primals
  padded = blocks.pad_keys(keys, cut.length)

  def step(carry: _KeyGradients, index: Array) -> tuple[_KeyGradients, None]:
    d_floats, d_key, d_value = carry
    place = cut.place(index)
    block = cut.take_keys(padded, place, state.length)
    variables, last_exponent, d_sums = cut.take_heads(
      (constants, exponent, gradient.linear), place
    )
    d_more, d_block_key, d_block_value = chunks.add_keys_vjp(
      engine, variables, last_exponent, block, d_sums
    )
    d_floats = cut.add_to_heads(d_floats, d_more, place)
    d_key = cut.write(d_key, d_block_key, place)
    return (d_floats, d_key, cut.write(d_value, d_block_value, place)), None

  zeros = jax.tree.map(jnp.zeros_like, leaves.floats(constants))
  carry = zeros, blocks.empty_like(padded[0]), blocks.empty_like(padded[1])
  (d_floats, d_key, d_value), _ = jax.lax.scan(step, carry, cut.indices())
  rescaled = lambda linear: rescale(state.with_linear(linear), exponent).linear
  (d_linear,) = jax.vjp(rescaled, state.linear)[1](gradient.linear)
  length = keys[0].shape[1]
  return (
    leaves.only_floats(constants, d_floats),
    leaves.no_gradient(state).with_linear(d_linear),
    (d_key[:, :length], d_value[:, :length], None),
  )


def read(call: Call, position: Array) -> Array:
  """Returns the outputs of queries that see the state, ``[B, T, N, G, V]``.

  Args:
    call: its state has all keys; the arrays of keys are not used.
    position: of the first query.
  """
  query, dtype = call.inputs.query, call.inputs.value.dtype
  cut = cut_of(query, call.chunk_size)
  engine = Engine(call.maps, FAST, cut.size)
  run = derivatives.with_backward(
    functools.partial(read_queries, cut, dtype, engine),
    functools.partial(read_backward, cut, engine),
    functools.partial(
      read_queries, cut, dtype, engine._replace(products=EXACT)
    ),
  )
  return run(*alike(call.constants, join_sums(call.state), query), position)


def read_queries(
  cut: blocks.Blocks,
  dtype: jnp.dtype,
  engine: Engine,
  constants: PyTree,
  state: JoinedState,
  query: Array,
  position: Array,
) -> tuple[Array, tuple[Array, Saved]]:
  """Returns the outputs, and what the backward pass gets."""
  padded = blocks.pad(blocks.flat(query), cut.length)

  def step(out: Array, index: Array) -> tuple[Array, Saved]:
    place = cut.place(index)
    of_heads = cut.take_heads((constants, state), place)
    block = cut.take_queries(padded, place)
    block_out, saved = chunks.read(
      engine, *of_heads, block, position + place.position
    )
    return cut.write(out, block_out, place), saved

  depth = engine.result.depth(
    state.sums.shape[-1] - 1, is_signed=state.magnitude is not None
  )
  out = blocks.empty_like(padded, depth, dtype)
  step = engine.products.checkpoint(step)
  out, saved = jax.lax.scan(step, out, cut.indices())
  out = out[:, : query.shape[1]].reshape(*query.shape[:-1], -1)
  return out, (out, saved)


def read_backward(
  cut: blocks.Blocks,
  engine: Engine,
  primals: tuple[PyTree, JoinedState, Array, Array],
  saved: tuple[Array, Saved],
  d_out: Array,
) -> tuple[PyTree, JoinedState, Array, None]:
  """Computes gradients block by block; of constants and sums they add up."""
  (constants, state, query, position), (out, of_blocks) = primals, saved
  padded, out, d_out = (
    blocks.pad(blocks.flat(x), cut.length) for x in (query, out, d_out)
  )

  def step(
    carry: _QueryGradients, x: tuple[Array, Saved]
  ) -> tuple[_QueryGradients, None]:
    total, d_query = carry
    index, saved = x
    place = cut.place(index)
    d_floats, d_linear, d_block = chunks.read_vjp(
      engine,
      *cut.take_heads((constants, state), place),
      cut.take_queries(padded, place),
      position + place.position,
      cut.take_queries(out, place),
      saved,
      cut.take_queries(d_out, place).astype(jnp.float32),
    )
    total = cut.add_to_heads(total, (d_floats, d_linear), place)
    return (total, cut.write(d_query, d_block, place)), None

  moving = leaves.floats(constants), state.linear
  carry = jax.tree.map(jnp.zeros_like, moving), blocks.empty_like(padded)
  xs = cut.indices(), of_blocks
  ((d_floats, d_linear), d_query), _ = jax.lax.scan(step, carry, xs)
  return (
    leaves.only_floats(constants, d_floats),
    leaves.no_gradient(state).with_linear(d_linear),
    d_query[:, : query.shape[1]].reshape(query.shape),
    None,
  )


def cut_of(
  x: Array | jax.ShapeDtypeStruct, chunk_size: int | None
) -> blocks.Blocks:
  """Plans the blocks of queries or keys ``[B, S, N, ...]``."""
  batch, length, heads = x.shape[:3]
  plan = plan_blocks(
    length,
    batch * heads,
    chunk_size,
    num_devices=jax.device_count(),
    platform=current_platform(),
  )
  return blocks.Blocks(batch, heads, *plan)
