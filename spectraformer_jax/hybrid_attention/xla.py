"""Hybrid attention in plain XLA, in time and memory O(T).

The far parts come first (`far`). A loop over blocks of queries then computes
the exact part of a block (`scores`), adds the parts and divides (`parts`). The
backward pass computes weights and features again; it gets query, key, value,
output, and for each query one divisor per part.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.hybrid_attention.block_keys import (
  KeyValue,
  SetGradients,
  add_gradients,
  keys_of_block,
  no_gradients,
  pad_row,
)
from spectraformer_jax.hybrid_attention.far import (
  CausalPass,
  PartGradient,
  Pass,
  WholePass,
)
from spectraformer_jax.hybrid_attention.layout import Row, Setting
from spectraformer_jax.hybrid_attention.parts import (
  Quotient,
  divide_parts,
  far_part,
)
from spectraformer_jax.hybrid_attention.scores import exact_part
from spectraformer_jax.linear_attention import derivatives, leaves
from spectraformer_jax.linear_attention.inputs import Maps
from spectraformer_jax.linear_attention.platforms import current_platform
from spectraformer_jax.linear_attention.state import (
  JoinedState,
  State,
  join_sums,
  split_sums,
)
from spectraformer_jax.linear_attention.varying import alike
from spectraformer_jax.linear_attention.xla import blocks
from spectraformer_jax.linear_attention.xla.bidirectional import cut_of
from spectraformer_jax.linear_attention.xla.chunks import Engine
from spectraformer_jax.linear_attention.xla.plan import plan_causal
from spectraformer_jax.linear_attention.xla.products import (
  EXACT,
  FAST,
  Products,
)
from spectraformer_jax.linear_attention.xla.results import divisor_vjp
from spectraformer_jax.typing import Array, PyTree

# What the backward pass gets: outputs, divisors of the parts, and what the
# passes save.
_Saved = tuple[Array, list[Array], list[PyTree]]


class _Plan(NamedTuple):
  """The loops of one call; static.

  Attributes:
    setting: see `Setting`.
    passes: over far keys; their sums add up.
    cut: blocks of queries in the exact part.
  """

  setting: Setting
  passes: tuple[Pass, ...]
  cut: blocks.Blocks


def attend(
  maps: Maps,
  setting: Setting,
  chunk_size: int | None,
  constants: PyTree,
  state: State,
  row: Row,
) -> tuple[Array, State]:
  """Attends; see the module.

  Args:
    maps: complete feature maps of queries and keys.
    setting: see `Setting`.
    chunk_size: positions in a chunk; None: the fastest sizes.
    constants: variables of the maps.
    state: sums over earlier far keys.
    row: the arrays.

  Returns:
    ``[B, T, N, G, V]`` of value's dtype, and the sums after the far keys.
  """
  plan = _plan(setting, chunk_size, row)
  engine = Engine(maps, FAST, plan.cut.size)
  run = derivatives.with_backward(
    functools.partial(_run, plan, engine),
    functools.partial(_backward, plan, engine),
    functools.partial(_run, plan, engine._replace(products=EXACT)),
  )
  out, after = run(*alike(constants, join_sums(state), row))
  return out, split_sums(after)


def _plan(setting: Setting, chunk_size: int | None, row: Row) -> _Plan:
  """Plans the passes over far keys, and the blocks of the exact part."""
  exact, (batch, length, heads, _, _) = setting.exact, row.query.shape
  plan = plan_causal(
    length,
    batch * heads,
    chunk_size,
    is_packed=row.segment is not None,
    platform=current_platform(),
  )
  steps = blocks.Blocks(batch, heads, plan.step_size, plan.num_steps)
  num_blocks = plan.num_steps * plan.chunks_per_step
  cut = blocks.Blocks(batch, heads, plan.chunk_size, num_blocks)
  if not setting.is_causal and exact.window is None:
    padded = jax.ShapeDtypeStruct((batch, cut.length, heads), jnp.float32)
    cuts = [cut_of(x, chunk_size) for x in (row.key, padded)]
    return _Plan(setting, (WholePass(*cuts),), cut)
  is_strict = exact.window is not None
  passes = [CausalPass(plan, steps, exact.left, is_strict, length)]
  if not setting.is_causal:
    later = steps._replace(is_reversed=True, key_start=exact.left + exact.right)
    passes.append(CausalPass(plan, later, exact.left, is_strict, length))
  return _Plan(setting, tuple(passes), cut)


def _run(
  plan: _Plan,
  engine: Engine,
  constants: PyTree,
  state: JoinedState,
  row: Row,
) -> tuple[tuple[Array, JoinedState], _Saved]:
  """Returns output and sums after the far keys, and what is saved."""
  cut, value_dim = plan.cut, row.value.shape[-1]
  padded = pad_row(plan.setting, row, cut.length)
  far, states, saved = zip(
    *(one.forward(engine, constants, state, padded) for one in plan.passes),
    strict=True,
  )

  def step(
    carry: tuple[Array, list[Array]], index: Array
  ) -> tuple[tuple[Array, list[Array]], None]:
    out, divisors = carry
    place = cut.place(index)
    exact = exact_part(
      plan.setting,
      engine.products,
      cut.take_queries(padded.query, place),
      *keys_of_block(plan.setting, padded, place.position, cut.size),
    )
    of_passes = [
      far_part(cut.take_queries(sums, place), value_dim) for sums in far
    ]
    total = divide_parts(exact, of_passes, plan.setting.num_rows)
    exponents = [exact.exponent, *(of_pass.exponent for of_pass in of_passes)]
    new = _divisors(total, exponents)
    divisors = [
      cut.write(whole, block, place)
      for whole, block in zip(divisors, new, strict=True)
    ]
    return (cut.write(out, total.out, place), divisors), None

  out = blocks.empty_like(padded.query, value_dim, row.value.dtype)
  one_each = blocks.empty_like(padded.query, 1, jnp.dtype(jnp.float32))
  # Divisors of the exact part and of the passes, and which are floored.
  divisors = [one_each] * (len(far) + 2)
  (out, divisors), _ = jax.lax.scan(
    engine.products.checkpoint(step), (out, divisors), cut.indices()
  )
  length = row.query.shape[1]
  after = states[0]._replace(length=state.length + length)
  result = out[:, :length].reshape(*row.query.shape[:-1], -1)
  return (result, after), (out, divisors, list(saved))


def _divisors(total: Quotient, exponents: list[Array]) -> list[Array]:
  """Returns the divisor in the units of each part, and where it is floored.

  A divisor of 0 means that the part has no gradient.
  """
  exact, *far = map(total.divisor_of, exponents)
  far = [jnp.where(total.keeps_far, divisor, 0.0) for divisor in far]
  return [exact, *far, total.is_floored.astype(jnp.float32)]


def _backward(
  plan: _Plan,
  engine: Engine,
  primals: tuple[PyTree, JoinedState, Row],
  saved: _Saved,
  gradients: tuple[Array, JoinedState],
) -> tuple[PyTree, JoinedState, Row]:
  """Computes the gradients of all inputs, part by part."""
  constants, state, row = primals
  (out, divisors, of_passes), (d_out, d_after) = saved, gradients
  of_exact, *of_far, is_floored = divisors
  padded = pad_row(plan.setting, row, plan.cut.length)
  # A floored divisor takes no gradient: with outputs of 0, `divisor_vjp` gives
  # it none.
  out = jnp.where(is_floored > 0.0, 0.0, out)
  d_out = blocks.pad(blocks.flat(d_out), plan.cut.length)
  d_query, ((d_key, d_value), d_special) = _exact_backward(
    plan, engine.products, padded, PartGradient(out, of_exact, d_out)
  )
  floats = jax.tree.map(jnp.zeros_like, leaves.floats(constants))
  total = floats, d_after.linear, [d_query, d_key, d_value]
  d_first = []
  for one, of_pass, divisor in zip(plan.passes, of_passes, of_far, strict=True):
    floats, linear, of_arrays = one.backward(
      engine,
      (constants, state, padded),
      of_pass,
      PartGradient(out, divisor, d_out),
      total,
    )
    d_first.append(linear)
    # Only the first pass has a state before and after it.
    total = floats, jax.tree.map(jnp.zeros_like, linear), of_arrays
  floats, _, (d_query, d_key, d_value) = total
  length, num_keys = row.query.shape[1], row.key.shape[1]
  if row.segment is not None:
    d_special = KeyValue(*(x[:, :length] for x in d_special))
  return (
    leaves.only_floats(constants, floats),
    leaves.no_gradient(state).with_linear(d_first[0]),
    leaves.no_gradient(row)._replace(
      query=d_query[:, :length].reshape(row.query.shape),
      key=d_key[:, :num_keys],
      value=d_value[:, :num_keys],
      special=leaves.no_gradient(row.special)._replace(**d_special._asdict()),
    ),
  )


def _exact_backward(
  plan: _Plan, products: Products, padded: Row, part: PartGradient
) -> tuple[Array, SetGradients]:
  """Returns the gradients of the exact part, for queries and keys."""
  cut, setting = plan.cut, plan.setting

  def step(
    carry: tuple[Array, SetGradients], index: Array
  ) -> tuple[tuple[Array, SetGradients], None]:
    d_query, d_sets = carry
    place = cut.place(index)
    x, out, divisor, d_out = (
      cut.take_queries(array, place) for array in (padded.query, *part)
    )
    # Queries without a gradient may hold anything.
    d_out = d_out.astype(jnp.float32)
    unused = jnp.all(d_out == 0.0, axis=-1, keepdims=True)
    x, out = (jnp.where(unused, 0, array) for array in (x, out))
    divisor = jnp.where(unused, 1.0, divisor)
    sets = keys_of_block(setting, padded, place.position, cut.size)

    def sums(x: Array, arrays: list[KeyValue]) -> Array:
      moved = [
        of_set._replace(key=key, value=value)
        for of_set, (key, value) in zip(sets, arrays, strict=True)
      ]
      return exact_part(setting, products, x, *moved).sums

    arrays = [KeyValue(of_set.key, of_set.value) for of_set in sets]
    _, pull = jax.vjp(sums, x, arrays)
    d_x, found = pull(divisor_vjp(out.astype(jnp.float32), divisor, d_out))
    d_sets = add_gradients(d_sets, padded, found, place.position)
    return (cut.write(d_query, d_x, place), d_sets), None

  carry = blocks.empty_like(padded.query), no_gradients(padded)
  return jax.lax.scan(step, carry, cut.indices())[0]
