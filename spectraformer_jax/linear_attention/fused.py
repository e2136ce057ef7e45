"""Feature map and prefix sum in one pass: features never all exist at once.

Sequences are cut into chunks. Features are made chunk by chunk and dropped
again, in the backward pass as well: what stays between the two is query, key,
value and the state at every `STRIDE`-th chunk boundary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import blocks, chunks, leaves
from spectraformer_jax.linear_attention.state import FeatureFn, State
from spectraformer_jax.typing import Array, PyTree

# Chunks between two states that are kept for the backward pass.
STRIDE = 16

# Default chunk sizes. In the causal form the masked product costs C (F + V)
# per token and the state F V, so C near V is cheapest on a CPU; matrix units
# want more rows.
CAUSAL_CHUNK = {"cpu": 64, "gpu": 128, "tpu": 256}
# Without a mask larger blocks cost nothing until features leave the cache: on a
# CPU all rows (examples and heads) of a block have this many positions.
CPU_POSITIONS = 2048
BLOCK = 1024


class Maps(NamedTuple):
  """The feature maps of the two sides; static."""

  query: FeatureFn
  key: FeatureFn


def default_chunk(is_causal: bool, key: Array) -> int:
  """A good chunk size for the backend in use and keys ``[B, S, N, H]``."""
  backend = jax.default_backend()
  if is_causal:
    return CAUSAL_CHUNK.get(backend, CAUSAL_CHUNK["gpu"])
  if backend == "cpu":
    return max(64, min(BLOCK, CPU_POSITIONS // (key.shape[0] * key.shape[2])))
  return BLOCK


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
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
  return _read_blocks(query_map, chunk, constants, state, query, position)[0]


def _read_blocks(query_map, chunk, constants, state, query, position):
  """The output, and for each block the largest exponents of its queries."""
  length, heads = query.shape[1:3]
  size = min(chunk, length)
  padded = blocks.pad(blocks.flat(query), size)

  def step(out, index):
    block = blocks.query_block(padded, heads, index, size)
    where = position + index * size
    found, top = chunks.read(query_map, constants, state, block, where)
    return blocks.write(out, found, index), top

  out = blocks.empty(padded, state.kv.shape[-1], state.kv.dtype)
  count = jnp.arange(padded.shape[1] // size)
  out, tops = jax.lax.scan(step, out, count)
  return out[:, :length].reshape(*query.shape[:-1], -1), tops


def _read_fwd(query_map, chunk, constants, state, query, position):
  out, tops = _read_blocks(query_map, chunk, constants, state, query, position)
  return out, (constants, state, query, position, tops)


def _read_bwd(query_map, chunk, residuals, gradient):
  """Blocks are independent; what they say of the state is added up."""
  constants, state, query, position, tops = residuals
  length, heads = query.shape[1:3]
  size = min(chunk, length)
  padded, gradient = (
    blocks.pad(blocks.flat(x), size) for x in (query, gradient)
  )

  def step(carry, x):
    total, d_query = carry
    index, top = x
    _, pull = jax.vjp(
      lambda floats, sums, block: chunks.read(
        query_map,
        leaves.with_floats(constants, floats),
        leaves.with_sums(state, sums),
        block,
        position + index * size,
        top,
      )[0],
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
  ((d_floats, d_sums), d_query), _ = jax.lax.scan(step, carry, (count, tops))
  return (
    leaves.gradient_of_constants(constants, d_floats),
    leaves.gradient_of_state(state, d_sums),
    d_query[:, :length].reshape(query.shape),
    leaves.no_gradient(jnp.asarray(position)),
  )


read.defvjp(_read_fwd, _read_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
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
  out = accumulate(key_map, chunk, constants, state, key, value, keep)
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


accumulate.defvjp(_accumulate_fwd, _accumulate_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def causal(
  maps: Maps,
  chunk: int,
  constants: PyTree,
  state: State,
  query: Array,
  key: Array,
  value: Array,
  keep: Array | None,
  segment: Array | None,
) -> tuple[Array, State]:
  """Query i sees the initial state and visible keys 0..i of its segment.

  Args:
    maps: feature maps.
    chunk: positions in a chunk.
    constants: variables of the maps.
    state: sums over keys that came before.
    query: ``[B, T, N, G, H]``.
    key: ``[B, T, N, H]``.
    value: ``[B, T, N, V]`` float32.
    keep: bool ``[B, T]`` or None.
    segment: ids ``[B, T]`` of packed rows, not decreasing, or None.

  Returns:
    ``[B, T, N, G, V]`` float32 and the state after the last key.
  """
  plan = _Plan(maps, chunk, query, key, value, keep, segment)
  out, state, _ = _causal_forward(plan, constants, state)
  return out, state


class _Plan:
  """Padded inputs of the causal form, and the work on one chunk of them."""

  def __init__(self, maps, chunk, query, key, value, keep, segment):
    self.maps = maps
    self.shape = query.shape
    self.length = query.shape[1]
    self.size = min(chunk, self.length)
    count = -(-self.length // self.size)
    self.outer = -(-count // STRIDE)
    self.inner = -(-count // self.outer)
    multiple = self.size * self.inner * self.outer
    if multiple != self.length and keep is None:
      keep = jnp.ones(key.shape[:2], bool)
    self.query, self.key, self.value, self.keep = (
      blocks.pad(x, multiple) for x in (blocks.flat(query), key, value, keep)
    )
    # Padding belongs to the last segment: it is masked in any case.
    self.segment = blocks.pad(segment, multiple, mode="edge")

  def inputs(self, index, start):
    """Query, key, value, position, keep and segment of one chunk."""
    segment = self.segment
    if segment is not None:
      segment = blocks.take(segment, index, self.size)
    return (
      self.query_block(self.query, index),
      *blocks.key_block(
        self.key, self.value, self.keep, index, self.size, start
      ),
      segment,
    )

  def query_block(self, query, index):
    """One chunk of an array that is like the queries."""
    return blocks.query_block(query, self.shape[2], index, self.size)

  def chunk(self, constants, state, *inputs):
    """State and output after one chunk."""
    return chunks.causal_chunk(*self.maps, constants, state, *inputs)

  def index(self, outer, inner):
    """The number of a chunk."""
    return outer * self.inner + inner


def _causal_forward(plan, constants, state):
  """Output, last state, and the state before each stride."""
  start = state.length

  def stride(carry, outer):
    def step(carry, inner):
      state, out = carry
      index = plan.index(outer, inner)
      state, found = plan.chunk(constants, state, *plan.inputs(index, start))
      return (state, blocks.write(out, found, index)), None

    after, _ = jax.lax.scan(step, carry, jnp.arange(plan.inner))
    return after, carry[0]

  out = blocks.empty(plan.query, plan.value.shape[-1], plan.value.dtype)
  (state, out), boundaries = jax.lax.scan(
    stride, (state, out), jnp.arange(plan.outer)
  )
  state = state._replace(length=start + plan.length)
  out = out[:, : plan.length].reshape(*plan.shape[:-1], -1)
  return out, state, boundaries


def _causal_fwd(maps, chunk, constants, state, *inputs):
  plan = _Plan(maps, chunk, *inputs)
  out, after, boundaries = _causal_forward(plan, constants, state)
  return (out, after), (constants, state, boundaries, inputs)


def _causal_bwd(maps, chunk, residuals, gradients):
  """Strides last to first; inside one, states are made again, then used."""
  constants, initial, boundaries, inputs = residuals
  plan = _Plan(maps, chunk, *inputs)
  d_out, d_state = gradients
  d_out = blocks.pad(blocks.flat(d_out), plan.size * plan.inner * plan.outer)

  def stride(carry, x):
    outer, state = x

    def again(state, inner):
      inputs = plan.inputs(plan.index(outer, inner), initial.length)
      return plan.chunk(constants, state, *inputs)[0], state

    _, states = jax.lax.scan(again, state, jnp.arange(plan.inner))

    def step(carry, x):
      d_floats, d_state, *d_inputs = carry
      inner, state = x
      index = plan.index(outer, inner)
      query, key, value, *where = plan.inputs(index, initial.length)

      def one_chunk(floats, sums, query, key, value):
        after, out = plan.chunk(
          leaves.with_floats(constants, floats),
          leaves.with_sums(state, sums),
          *(query, key, value, *where),
        )
        return leaves.sums(after), out

      _, pull = jax.vjp(
        one_chunk,
        leaves.floats(constants),
        leaves.sums(state),
        query,
        key,
        value,
      )
      d_chunk = plan.query_block(d_out, index)
      pulled = pull((d_state, d_chunk))
      d_inputs = (
        blocks.write(whole, block, index)
        for whole, block in zip(d_inputs, pulled[2:], strict=True)
      )
      return (leaves.tree_add(d_floats, pulled[0]), pulled[1], *d_inputs), None

    return jax.lax.scan(
      step, carry, (jnp.arange(plan.inner), states), reverse=True
    )

  d_floats, *d_inputs = jax.tree.map(
    jnp.zeros_like, (leaves.floats(constants), plan.query, plan.key, plan.value)
  )
  (d_floats, d_sums, *d_inputs), _ = jax.lax.scan(
    stride,
    (d_floats, leaves.sums(d_state), *d_inputs),
    (jnp.arange(plan.outer), boundaries),
    reverse=True,
  )
  d_query, d_key, d_value = (d[:, : plan.length] for d in d_inputs)
  return (
    leaves.gradient_of_constants(constants, d_floats),
    leaves.gradient_of_state(initial, d_sums),
    d_query.reshape(plan.shape),
    d_key,
    d_value,
    None,
    None,
  )


causal.defvjp(_causal_fwd, _causal_bwd)
