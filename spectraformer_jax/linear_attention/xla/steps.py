"""One step of a causal pass: L chunks of C positions at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import leaves
from spectraformer_jax.linear_attention.exponents import LOWEST
from spectraformer_jax.linear_attention.inputs import Features
from spectraformer_jax.linear_attention.state import (
  JoinedState,
  Linear,
  add_exactly,
  rescale,
)
from spectraformer_jax.linear_attention.xla import chunks
from spectraformer_jax.linear_attention.xla import features as scaled
from spectraformer_jax.linear_attention.xla.blocks import CausalBlock
from spectraformer_jax.linear_attention.xla.chunks import (
  Engine,
  Saved,
)
from spectraformer_jax.linear_attention.xla.results import QuerySums
from spectraformer_jax.typing import Array, PyTree


class _StepKeys(NamedTuple):
  """The keys of a step, and the states that its queries read.

  Attributes:
    psi: features of the keys, ``[B, N, L, C, F]``.
    value: values with ones, ``[B, N, L, C, V + 1]``.
    exponent: of psi, ``[B, N, F or 1]``; with segments ``[B, N, C, F or 1]``.
    before: the state before each chunk, S_<c and z_<c; the leading axes of its
      sums are ``[B, N, L]``.
    after: the state after the step.
    has_keys: whether there are keys before the step, bool ``[B, N, 1]``.
  """

  psi: Array
  value: Array
  exponent: Array
  before: JoinedState
  after: JoinedState
  has_keys: Array


def attend(
  engine: Engine, constants: PyTree, state: JoinedState, block: CausalBlock
) -> tuple[JoinedState, Array, Saved]:
  """Attends in L chunks; a query sees the state and keys up to its position.

  Args:
    engine: see `Engine`.
    constants: variables of the maps.
    state: sums over the keys before the step.
    block: queries and keys of L C positions; with segments, L is 1.

  Returns:
    The state after the step, the outputs ``[B, N, G, L C, V]``, and what the
    backward pass gets.
  """
  step = _sum_keys(engine, constants, state, block)
  position = block.keys.position
  features = chunks.map_queries(engine, constants, block.query, position)
  exponent = _exponents_of_queries(step.exponent, block)
  query_exponent = scaled.query_exponents(features, exponent)
  sums, needs_weight = _sums(engine, features, query_exponent, step, block)
  out, normalizer = engine.result.forward(sums, needs_weight, query_exponent)
  groups = block.query.shape[2]
  out = out.reshape(*out.shape[:3], groups, engine.chunk_size, -1)
  out = jnp.swapaxes(out, 2, 3).reshape(*block.query.shape[:-1], -1)
  return step.after, out, Saved(normalizer, query_exponent)


def attend_vjp(
  engine: Engine,
  constants: PyTree,
  state: JoinedState,
  block: CausalBlock,
  out: Array,
  saved: Saved,
  d_after: Linear,
  d_out: Array,
) -> tuple[list[Array], Linear, Array, Array, Array]:
  """Returns gradients of `attend`.

  Args:
    engine: see `attend`.
    constants: see `attend`.
    state: see `attend`.
    block: see `attend`.
    out: the outputs of `attend`.
    saved: the last result of `attend`.
    d_after: the gradient of the sums after the step.
    d_out: the gradient of `out`, float32.

  Returns:
    Gradients of the constants' floats, the state's sums, query, key and value.
  """
  query, out, saved = chunks.replace_unused(
    engine, block.query, out, saved, d_out
  )

  def sums_of(
    floats: list[Array], linear: Linear, query: Array, key: Array, value: Array
  ) -> tuple[tuple[Linear, QuerySums], Array | None]:
    variables = leaves.with_floats(constants, floats)
    keys = block.keys._replace(key=key, value=value)
    new_block = CausalBlock(query, keys, block.segment)
    step = _sum_keys(engine, variables, state.with_linear(linear), new_block)
    features = chunks.map_queries(engine, variables, query, keys.position)
    sums, needs_weight = _sums(
      engine, features, saved.query_exponent, step, new_block
    )
    return (step.after.linear, sums), needs_weight

  floats, keys = leaves.floats(constants), block.keys
  (_, sums), pull, needs_weight = jax.vjp(
    sums_of, floats, state.linear, query, keys.key, keys.value, has_aux=True
  )
  out, d_out = (chunks.chunks_first(engine, x) for x in (out, d_out))
  d_sums = engine.result.backward(
    sums, needs_weight, out, saved.normalizer, d_out
  )
  return pull((d_after, d_sums))


def state_after(
  engine: Engine, constants: PyTree, state: JoinedState, block: CausalBlock
) -> JoinedState:
  """Returns the first result of `attend` alone, at less cost."""
  return _sum_keys(engine, constants, state, block).after


def _sum_keys(
  engine: Engine, constants: PyTree, state: JoinedState, block: CausalBlock
) -> _StepKeys:
  """Maps the keys of a step and sums over them; see `attend`."""
  keys, segment = block.keys, block.segment
  if segment is not None:
    state = _state_for(state, segment[:, 0])
  has_keys = chunks.has_keys(state)
  features, mask = chunks.map_keys(engine, constants, keys)
  exponent = scaled.key_exponents(features, state.exponent, mask, segment)
  psi = scaled.scale_keys(features, exponent, mask, engine.products)
  value = chunks.in_chunks(engine, chunks.with_ones(keys.value))
  state = rescale(state, exponent if segment is None else exponent[:, :, 0])
  before, after = _prefix_sums(engine, state, psi, value)
  if segment is not None:
    # The state after the step holds only keys of the last segment.
    state = _state_for(state, segment[:, -1])
    is_last = (segment == segment[:, -1:])[:, None, :, None]
    last = jnp.where(is_last, psi[:, :, 0], 0.0)
    state = rescale(state, exponent[:, :, -1])
    after = chunks.add(engine, state, last, value[:, :, 0])
  return _StepKeys(psi, value, exponent, before, after, has_keys)


def _sums(
  engine: Engine,
  features: Features,
  query_exponent: Array | None,
  step: _StepKeys,
  block: CausalBlock,
) -> tuple[QuerySums, Array | None]:
  """Returns sums over each query's keys, and the result of `needs_weight`."""
  groups, segment = block.query.shape[2], block.segment
  exponent = _exponents_of_queries(step.exponent, block)
  phi = scaled.scale_queries(
    features, exponent, query_exponent, engine.products
  )
  size = engine.chunk_size
  is_visible = jnp.tril(jnp.ones((size, size), bool), -int(engine.is_strict))
  is_visible = is_visible[None, None, None]
  if segment is not None:
    same = segment[:, :, None] == segment[:, None, :]
    is_visible &= same[:, None, None]
  is_visible = jnp.tile(is_visible, (1, 1, 1, groups, 1))

  def within_chunk(phi: Array, psi: Array) -> Array:
    weights = jnp.einsum("...cf,...df->...cd", phi, psi)
    return jnp.where(is_visible, weights, 0.0)

  # Numerators, and in the last column normalizers, of the equation in `causal`:
  # phi S_<c + tril(phi psi^T) value.
  sums = engine.products.queries_times_state(phi, step.before.sums)
  magnitude = chunks.times_magnitude(phi, step.before)
  sees_state = step.has_keys[:, :, None]
  if segment is not None:
    # The state belongs to the first segment; other queries do not see it.
    is_first = jnp.tile(segment == segment[:, :1], (1, groups))[:, None, None]
    sees_state &= is_first
    sums = jnp.where(is_first[..., None], sums, 0.0)
    if magnitude is not None:
      magnitude = jnp.where(is_first, magnitude, 0.0)
  weights = within_chunk(phi, step.psi)
  sums += jnp.einsum("...cd,...dv->...cv", weights, step.value)
  if magnitude is not None:
    weights = within_chunk(jnp.abs(phi), jnp.abs(step.psi))
    magnitude += jnp.sum(weights, axis=-1)
  query_sums = QuerySums(sums, magnitude)
  sees_keys = sees_state | _sees_new_keys(engine, block, is_visible)
  return query_sums, chunks.needs_weight(
    sees_keys, features, phi, query_exponent, query_sums
  )


def _exponents_of_queries(exponent: Array, block: CausalBlock) -> Array:
  """Returns the exponents that queries read; see `_StepKeys.exponent`."""
  if block.segment is None:
    return exponent
  return jnp.tile(exponent, (1, 1, block.query.shape[2], 1))


def _sees_new_keys(
  engine: Engine, block: CausalBlock, is_visible: Array
) -> Array:
  """Whether each query sees keys of its step; bool ``[B, 1 or N, L, G C]``.

  Args:
    engine: see `Engine`.
    block: see `attend`.
    is_visible: which keys of its chunk a query may see by position and segment,
      bool ``[B or 1, 1, 1, G C, C]``.
  """
  mask = block.keys.key_mask
  if mask is None:
    return jnp.ones((1, 1, 1, 1), bool)
  mask = mask[..., 0]
  if block.segment is not None:  # one chunk
    return jnp.any(is_visible & mask[:, :, None, None], axis=-1)
  position = jnp.arange(mask.shape[-1])[None, None]
  first = jnp.argmax(mask, axis=-1, keepdims=True)
  if engine.is_strict:
    first += 1
  sees = jnp.any(mask, axis=-1, keepdims=True) & (position >= first)
  sees = sees.reshape(*sees.shape[:2], -1, engine.chunk_size)
  return jnp.tile(sees, (1, 1, 1, block.query.shape[2]))


def _state_for(state: JoinedState, segment: Array) -> JoinedState:
  """Returns the state for queries of `segment` ``[B]``.

  Where the state belongs to another segment it becomes empty. Its exponent
  becomes the lowest: keys of another segment must not decide which features
  underflow.
  """
  same = (state.segment == segment)[:, None, None]
  magnitude = state.magnitude
  return state._replace(
    sums=jnp.where(same[..., None], state.sums, 0.0),
    magnitude=None if magnitude is None else jnp.where(same, magnitude, 0.0),
    exponent=jnp.where(same, state.exponent, LOWEST),
    segment=segment,
  )


def _prefix_sums(
  engine: Engine, state: JoinedState, psi: Array, value: Array
) -> tuple[JoinedState, JoinedState]:
  """Returns the states before each chunk, ``[B, N, L, ...]``, and the last."""
  of_chunks = engine.products.keys_times_values(psi, value)
  before, sums = _running(state.sums, of_chunks)
  rest = state.rest
  if rest is not None:
    sums, rest = add_exactly(state.sums, jnp.sum(of_chunks, axis=2), rest)
  magnitudes = magnitude = None
  if state.magnitude is not None:
    of_chunks = jnp.sum(jnp.abs(psi), axis=-2)
    magnitudes, magnitude = _running(state.magnitude, of_chunks)
  after = state._replace(sums=sums, magnitude=magnitude, rest=rest)
  return state._replace(sums=before, magnitude=magnitudes), after


def _running(first: Array, parts: Array) -> tuple[Array, Array]:
  """Returns the sum before each part, ``[B, N, L, ...]``, and that of all.

  On a CPU the parts are added one by one, because XLA computes a cumulative sum
  there by L^2 / 2 additions (docs/decisions/07-causal-steps.md). To be dropped
  once `_running_at_once` is as fast there for 32 chunks.
  """
  if parts.shape[2] == 1:
    return first[:, :, None], first + parts[:, :, 0]
  return jax.lax.platform_dependent(
    first, parts, cpu=_running_one_by_one, default=_running_at_once
  )


def _running_one_by_one(first: Array, parts: Array) -> tuple[Array, Array]:
  add = lambda total, part: (total + part, total)
  parts = jnp.moveaxis(parts, 2, 0)
  last, before = jax.lax.scan(add, first, parts, unroll=16)
  return jnp.moveaxis(before, 0, 2), last


def _running_at_once(first: Array, parts: Array) -> tuple[Array, Array]:
  first = first[:, :, None]
  ends = first + jnp.cumsum(parts, axis=2)
  return jnp.concatenate([first, ends[:, :, :-1]], axis=2), ends[:, :, -1]
