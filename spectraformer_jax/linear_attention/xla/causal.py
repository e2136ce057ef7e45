"""Queries that see earlier keys: feature map and prefix sum in one pass.

Sequences are cut into chunks, and a step takes one or more at once. Features
are made step by step and dropped again, in the backward pass as well: what
stays between the two is query, key, value, output, two numbers a query and the
state before some steps.
"""

import functools

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import derivatives, leaves
from spectraformer_jax.linear_attention.state import (
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


def causal(
  maps: Maps,
  chunk: int | None,
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
    chunk: positions in a chunk and a step; None for what is best.
    constants: variables of the maps.
    state: sums over keys that came before.
    query: ``[B, T, N, G, H]``.
    key: ``[B, T, N, H]``.
    value: ``[B, T, N, V]``.
    keep: bool ``[B, T]`` or None.
    segment: ids ``[B, T]`` of packed rows, not decreasing, or None.

  Returns:
    ``[B, T, N, G, V]`` of value's dtype and the state after the last key.
  """
  run = derivatives.with_backward(
    *(
      functools.partial(function, maps, chunk)
      for function in (_forward, _backward, _plain)
    )
  )
  inputs = (query, key, value, keep, segment)
  out, state = run(*alike(constants, fixed(joined(state)), *inputs))
  return out, parted(state)


class _Plan:
  """Padded inputs of the causal form, and the work on one step of them."""

  def __init__(self, maps, chunk, query, key, value, keep, segment):
    self.maps = maps
    self.shape = query.shape
    self.length = query.shape[1]
    chunk, together = blocks.step_size(chunk, key)
    if segment is not None:
      together = 1  # where segments meet, a state is that of the last one
    if blocks.is_known(self.length):
      self.chunk_size = min(chunk, self.length)
      count = -(-self.length // self.chunk_size)
      steps = -(-count // together)
      size = -(-count // steps) * self.chunk_size
      self.outer = -(-steps // max(1, blocks.sizes().stride // size))
      self.inner = -(-steps // self.outer)
    else:
      self.chunk_size = size = chunk
      self.inner = max(1, blocks.sizes().stride // size)
      self.outer = -(-self.length // (self.inner * size))
    batch, _, heads = key.shape[:3]
    self.cut = blocks.Cut(batch, heads, size, self.inner * self.outer)
    if self.cut.length != self.length and keep is None:
      keep = jnp.ones(key.shape[:2], bool)
    self.query, self.key, self.value, self.keep = (
      blocks.pad(x, self.cut.length)
      for x in (blocks.flat(query), key, value, keep)
    )
    # Padding belongs to the last segment: it is masked in any case.
    self.segment = blocks.pad(segment, self.cut.length, mode="edge")

  def inputs(self, place, start):
    """Query, key, value, position, keep and segment of one step."""
    segment = self.segment
    if segment is not None:
      segment = self.cut.take(segment, place)
    return (
      self.cut.queries(self.query, place),
      *self.cut.keys(self.key, self.value, self.keep, place, start),
      segment,
    )

  def step(
    self,
    constants,
    state,
    *inputs,
    products: Products,
    known: chunks.Found | None = None,
  ):
    """State after one step, and what its queries found."""
    args = (*self.maps, self.chunk_size, constants, state, *inputs)
    return chunks.causal_chunks(*args, products, known)

  def place(self, outer, inner):
    """Where a step starts."""
    return self.cut.place(outer * self.inner + inner)


def _strides(plan, products, constants, state):
  """Output, last state, the state before each stride, and what was found."""
  start = state.length

  def stride(carry, outer):
    def step(carry, inner):
      state, out = carry
      place = plan.place(outer, inner)
      state, found = plan.step(
        constants, state, *plan.inputs(place, start), products=products
      )
      out = plan.cut.write(out, found.out, place)
      return (state, out), found._replace(out=None)

    step = products.step(step)
    after, found = jax.lax.scan(step, carry, jnp.arange(plan.inner))
    return after, (carry[0], found)

  value = plan.value
  out = blocks.empty_like(plan.query, value.shape[-1], value.dtype)
  (state, out), (boundaries, found) = jax.lax.scan(
    stride, (state, out), jnp.arange(plan.outer)
  )
  state = state._replace(length=start + plan.length)
  out = out[:, : plan.length].reshape(*plan.shape[:-1], -1)
  return out, state, boundaries, found


def _forward(maps, chunk, constants, state, *inputs):
  """`causal` with joined sums, and what is kept."""
  plan = _Plan(maps, chunk, *inputs)
  out, after, *kept = _strides(plan, FORWARD, constants, state)
  return (out, after), (out, *kept)


def _plain(maps, chunk, constants, state, *inputs):
  return _strides(_Plan(maps, chunk, *inputs), PLAIN, constants, state)[:2]


def _backward(maps, chunk, inputs, kept, gradients):
  """Strides last to first; inside one, states are made again, then used."""
  constants, initial, *inputs = inputs
  out, boundaries, every = kept
  plan = _Plan(maps, chunk, *inputs)
  d_out, d_state = gradients
  out, d_out = (
    blocks.pad(blocks.flat(x), plan.cut.length) for x in (out, d_out)
  )

  def stride(carry, x):
    outer, state, every = x

    def again(state, inner):
      inputs = plan.inputs(plan.place(outer, inner), initial.length)
      after, _ = plan.step(constants, state, *inputs, products=BACKWARD)
      return after, state

    _, states = jax.lax.scan(again, state, jnp.arange(plan.inner))

    def step(carry, x):
      d_floats, d_state, *d_inputs = carry
      inner, state, found = x
      place = plan.place(outer, inner)
      found = found._replace(out=plan.cut.queries(out, place))
      query, key, value, *where = plan.inputs(place, initial.length)
      d_block = plan.cut.queries(d_out, place).astype(jnp.float32)
      query, found = chunks.unless_unused(
        query, found, d_block, plan.cut.positions // plan.chunk_size
      )

      def one_step(floats, sums, query, key, value):
        after, again = plan.step(
          leaves.with_floats(constants, floats),
          leaves.with_sums(state, sums),
          *(query, key, value, *where),
          products=BACKWARD,
          known=found,
        )
        return leaves.sums(after), again.out

      _, pull = jax.vjp(
        one_step,
        leaves.floats(constants),
        leaves.sums(state),
        query,
        key,
        value,
      )
      pulled = pull((d_state, d_block))
      d_inputs = (
        plan.cut.write(whole, block, place)
        for whole, block in zip(d_inputs, pulled[2:], strict=True)
      )
      return (leaves.tree_add(d_floats, pulled[0]), pulled[1], *d_inputs), None

    return jax.lax.scan(
      step, carry, (jnp.arange(plan.inner), states, every), reverse=True
    )

  d_floats = jax.tree.map(jnp.zeros_like, leaves.floats(constants))
  d_inputs = map(blocks.empty_like, (plan.query, plan.key, plan.value))
  (d_floats, d_sums, *d_inputs), _ = jax.lax.scan(
    stride,
    (d_floats, leaves.sums(d_state), *d_inputs),
    (jnp.arange(plan.outer), boundaries, every),
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
