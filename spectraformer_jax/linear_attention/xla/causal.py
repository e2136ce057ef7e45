r"""Queries that see earlier keys: feature map and prefix sum in one pass.

For query i in chunk c, with features phi of queries and psi of keys:

.. math::
  o_i = \frac{\phi_i \cdot S_{<c} + \sum_{j \in c, j \le i}
    (\phi_i \cdot \psi_j) v_j}{\phi_i \cdot z_{<c} + \sum_{j \in c, j \le i}
    \phi_i \cdot \psi_j},
  \quad S_{<c} = \sum_{j \in \text{earlier chunks}} \psi_j v_j^\top,
  \quad z_{<c} = \sum_{j \in \text{earlier chunks}} \psi_j

`reference.causal_in_chunks` is this equation and nothing else. Here features
are scaled (`features`), several chunks make a step (`steps`), and S and z are
one array (`chunks`).

Features of the whole sequence never exist at once: each step computes its own,
and the backward pass computes them again. The backward pass gets query, key,
value, output, two numbers per query, and the state before each stride of steps
(`plan`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import derivatives, leaves
from spectraformer_jax.linear_attention.inputs import Call, Inputs
from spectraformer_jax.linear_attention.platforms import current_platform
from spectraformer_jax.linear_attention.state import (
  JoinedState,
  Linear,
  State,
  join_sums,
  split_sums,
)
from spectraformer_jax.linear_attention.varying import alike
from spectraformer_jax.linear_attention.xla import blocks, steps
from spectraformer_jax.linear_attention.xla.chunks import Engine, Saved
from spectraformer_jax.linear_attention.xla.plan import CausalPlan, plan_causal
from spectraformer_jax.linear_attention.xla.products import EXACT, FAST
from spectraformer_jax.typing import Array, PyTree

# The state and the outputs so far.
_Carry = tuple[JoinedState, Array]
# The state before each stride, and the results that each step saves.
OfStrides = tuple[JoinedState, Saved]
# What the backward pass gets: the outputs, and what strides and steps save.
_Saved = tuple[Array, OfStrides]
# The gradients of a backward loop so far: of constants, of sums, and of query,
# key and value.
Gradients = tuple[list[Array], Linear, list[Array]]


def causal(call: Call) -> tuple[Array, State]:
  """Attends; query i sees the state and visible keys 0..i of its segment.

  Args:
    call: T = S; segment ids do not decrease along a row, and are the same for
      queries and keys.

  Returns:
    ``[B, T, N, G, V]`` of value's dtype and the state after the last key.
  """
  inputs, segment_ids = call.inputs, call.inputs.segment_ids
  batch, length, heads, _ = inputs.key.shape
  plan = plan_causal(
    length,
    batch * heads,
    call.chunk_size,
    is_packed=segment_ids is not None,
    platform=current_platform(),
  )
  engine = Engine(call.maps, FAST, plan.chunk_size)
  attend = derivatives.with_backward(
    functools.partial(_run, plan, engine),
    functools.partial(_backward, plan, engine),
    functools.partial(_run, plan, engine._replace(products=EXACT)),
  )
  state = join_sums(call.state)
  if segment_ids is not None:
    state = state._replace(segment=segment_ids[0][:, 0])
  out, state = attend(*alike(call.constants, state, inputs))
  return out, split_sums(state)


def _run(
  plan: CausalPlan,
  engine: Engine,
  constants: PyTree,
  state: JoinedState,
  inputs: Inputs,
) -> tuple[tuple[Array, JoinedState], _Saved]:
  """Returns output and last state, and what the backward pass gets."""
  cut = _cut(plan, inputs)
  padded = blocks.pad_inputs(inputs, cut.length)
  after, out, saved = forward_loop(plan, cut, engine, constants, state, padded)
  length = inputs.query.shape[1]
  out = out[:, :length].reshape(*inputs.query.shape[:-1], -1)
  return (out, after._replace(length=state.length + length)), (out, saved)


def _backward(
  plan: CausalPlan,
  engine: Engine,
  primals: tuple[PyTree, JoinedState, Inputs],
  saved: _Saved,
  gradients: tuple[Array, JoinedState],
) -> tuple[PyTree, JoinedState, Inputs]:
  """Returns the gradients of all inputs."""
  constants, initial, inputs = primals
  (out, of_strides), (d_out, d_last) = saved, gradients
  cut = _cut(plan, inputs)
  padded = blocks.pad_inputs(inputs, cut.length)
  out, d_out = (blocks.pad(blocks.flat(x), cut.length) for x in (out, d_out))
  total = (
    jax.tree.map(jnp.zeros_like, leaves.floats(constants)),
    d_last.linear,
    [*map(blocks.empty_like, padded[:3])],
  )
  d_floats, d_first, d_inputs = backward_loop(
    plan,
    cut,
    engine,
    (constants, initial, padded),
    (out, of_strides),
    d_out,
    total,
    cut.write,
  )
  query, length = inputs.query, inputs.query.shape[1]
  d_query, d_key, d_value = (x[:, :length] for x in d_inputs)
  return (
    leaves.only_floats(constants, d_floats),
    leaves.no_gradient(initial).with_linear(d_first),
    leaves.no_gradient(inputs)._replace(
      query=d_query.reshape(query.shape), key=d_key, value=d_value
    ),
  )


def _cut(plan: CausalPlan, inputs: Inputs) -> blocks.Blocks:
  """Returns the steps of a plan, as blocks."""
  batch, _, heads, _ = inputs.key.shape
  return blocks.Blocks(batch, heads, plan.step_size, plan.num_steps)


def forward_loop(
  plan: CausalPlan,
  cut: blocks.Blocks,
  engine: Engine,
  constants: PyTree,
  state: JoinedState,
  padded: Inputs,
) -> tuple[JoinedState, Array, OfStrides]:
  """Attends step by step.

  Args:
    plan: sizes of strides and steps.
    cut: the steps, as blocks.
    engine: see `Engine`.
    constants: variables of the maps.
    state: sums over the keys before.
    padded: arrays of whole blocks; queries are flat.

  Returns:
    The state after the last key, outputs ``[B, T, N G, .]``, and what the
    backward pass gets beside them.
  """
  start = state.length

  def stride(
    carry: _Carry, stride_index: Array
  ) -> tuple[_Carry, tuple[JoinedState, Saved]]:
    def step(carry: _Carry, index: Array) -> tuple[_Carry, Saved]:
      state, out = carry
      place = cut.place(stride_index * plan.steps_per_stride + index)
      block = cut.take_causal(padded, place, start)
      state, block_out, saved = steps.attend(engine, constants, state, block)
      return (state, cut.write(out, block_out, place)), saved

    indices = jnp.arange(plan.steps_per_stride)
    after, saved = jax.lax.scan(
      engine.products.checkpoint(step), carry, indices
    )
    return after, (carry[0], saved)

  value, result = padded.value, engine.result
  depth = result.depth(value.shape[-1], is_signed=state.magnitude is not None)
  dtype = value.dtype if result.is_mean else jnp.dtype(jnp.float32)
  out = blocks.empty_like(padded.query, depth, dtype)
  (state, out), saved = jax.lax.scan(
    stride, (state, out), jnp.arange(plan.num_strides)
  )
  return state, out, saved


def backward_loop(
  plan: CausalPlan,
  cut: blocks.Blocks,
  engine: Engine,
  primals: tuple[PyTree, JoinedState, Inputs],
  saved: _Saved,
  d_out: Array,
  total: Gradients,
  put: Callable[[Array, Array, blocks.Place], Array],
) -> Gradients:
  """Adds the gradients of all inputs, from the last stride to the first.

  In each stride it computes the states before the steps again, from the first
  step to the last, and then differentiates the steps, from the last to the
  first.

  Args:
    plan: see `forward_loop`.
    cut: see `forward_loop`.
    engine: see `forward_loop`.
    primals: constants, state and arrays of `forward_loop`.
    saved: its other results.
    d_out: the gradient of the outputs.
    total: gradients so far; the second is that of the sums after the last key.
    put: `cut.write` if those of query, key and value are zeros, else `cut.add`.

  Returns:
    The gradients; the second is that of the sums before the first key.
  """
  (constants, initial, padded), (out, of_strides) = primals, saved
  indices = jnp.arange(plan.steps_per_stride)

  def stride(
    carry: Gradients, x: tuple[Array, tuple[JoinedState, Saved]]
  ) -> tuple[Gradients, None]:
    stride_index, (before, of_steps) = x

    def block_of(index: Array) -> tuple[blocks.Place, blocks.CausalBlock]:
      place = cut.place(stride_index * plan.steps_per_stride + index)
      return place, cut.take_causal(padded, place, initial.length)

    def recompute(
      state: JoinedState, index: Array
    ) -> tuple[JoinedState, JoinedState]:
      block = block_of(index)[1]
      return steps.state_after(engine, constants, state, block), state

    def step(
      carry: Gradients, x: tuple[Array, JoinedState, Saved]
    ) -> tuple[Gradients, None]:
      d_floats, d_after, d_inputs = carry
      index, state, saved = x
      place, block = block_of(index)
      d_more, d_before, *d_block = steps.attend_vjp(
        engine,
        constants,
        state,
        block,
        cut.take_queries(out, place),
        saved,
        d_after,
        cut.take_queries(d_out, place).astype(jnp.float32),
      )
      places = place, cut.of_keys(place), cut.of_keys(place)
      d_inputs = [
        put(*of_input)
        for of_input in zip(d_inputs, d_block, places, strict=True)
      ]
      return (leaves.tree_add(d_floats, d_more), d_before, d_inputs), None

    _, states = jax.lax.scan(recompute, before, indices)
    return jax.lax.scan(step, carry, (indices, states, of_steps), reverse=True)

  xs = jnp.arange(plan.num_strides), of_strides
  return jax.lax.scan(stride, total, xs, reverse=True)[0]
