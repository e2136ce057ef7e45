r"""Sums of features over far keys, in passes of the linear attention engine.

A query sees by features the keys that are neither in its window nor special.
With l positions of the window before a query, the far keys before query i are
those at j < i - l. Moved l places towards the end, they are the keys before
place i, which is what a causal pass sums:

    row     0  1  2  3  4  5         l = 2: query 5 is exact for keys 3, 4 and 5
    query   0  1  2  3  4 [5]
    moved         0 [1  2]              and sees keys 0, 1 and 2 by features

The keys after the window are those of a second pass, from the last position to
the first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.hybrid_attention.layout import Row
from spectraformer_jax.linear_attention import leaves
from spectraformer_jax.linear_attention.inputs import Inputs
from spectraformer_jax.linear_attention.state import JoinedState
from spectraformer_jax.linear_attention.xla import bidirectional, blocks, causal
from spectraformer_jax.linear_attention.xla.chunks import Engine, Saved
from spectraformer_jax.linear_attention.xla.plan import CausalPlan
from spectraformer_jax.linear_attention.xla.results import SUMS
from spectraformer_jax.typing import Array, PyTree

# What a pass keeps for its backward pass.
PassSaved = PyTree


class Gradients(NamedTuple):
  """The gradients of a pass: of constants' floats, of sums, and of the row."""

  floats: list[Array]
  linear: tuple[Array, Array | None]
  query: Array
  key: Array
  value: Array


class CausalPass(NamedTuple):
  """A pass over moved keys; static.

  Attributes:
    plan: its sizes.
    key_start: place in the row's key array of the key that is moved to the
      first query.
    own_start: place in the row's key array of the first query's own key.
    is_strict: whether a query sees no key at its own place.
    is_reversed: whether the pass goes from the last position to the first.
  """

  plan: CausalPlan
  key_start: int
  own_start: int
  is_strict: bool
  is_reversed: bool

  def forward(
    self, engine: Engine, constants: PyTree, state: JoinedState, row: Row
  ) -> tuple[Array, JoinedState, PassSaved]:
    """Returns columns of sums, the state after all, and what is saved."""
    engine, state, inputs = self._moved(engine, state, row)
    (sums, state), (_, saved) = causal.run(
      self.plan, engine, constants, state, inputs
    )
    return sums, state, saved

  def backward(
    self,
    engine: Engine,
    constants: PyTree,
    state: JoinedState,
    row: Row,
    saved: PassSaved,
    out: Array,
    divisor: Array,
    d_out: Array,
    d_after: JoinedState,
  ) -> Gradients:
    """Returns gradients, given those of the output and of the state after.

    Args:
      engine: see `forward`.
      constants: see `forward`.
      state: see `forward`.
      row: see `forward`.
      saved: the last result of `forward`.
      out: the quotient of all parts, ``[B, T, N, G, V]``.
      divisor: its divisor in the units of this pass, ``[B, T, N G]``.
      d_out: the gradient of `out`.
      d_after: the gradient of the state after the pass.
    """
    engine, state, inputs = self._moved(engine, state, row)
    of_strides, (_, query_exponent) = saved
    cut = causal.cut_of(self.plan, engine, inputs)
    stacked = cut.stacked(divisor, engine.chunk_size)
    steps = self.plan.num_strides, self.plan.steps_per_stride
    normalizer = stacked.reshape(*steps, *stacked.shape[1:])
    saved = out, (of_strides, Saved(normalizer, query_exponent))
    d_constants, d_state, d_inputs = causal.backward(
      self.plan, engine, (constants, state, inputs), saved, (d_out, d_after)
    )
    whole = [(0, 0), self._around(row), (0, 0), (0, 0)]
    return Gradients(
      jax.tree.leaves(d_constants),
      d_state.linear,
      d_inputs.query,
      jnp.pad(d_inputs.key, whole),
      jnp.pad(d_inputs.value, whole),
    )

  def _around(self, row: Row) -> tuple[int, int]:
    """Returns the number of places before and after the moved keys."""
    end = self.key_start + row.query.shape[1]
    return self.key_start, row.key.shape[1] - end

  def _moved(
    self, engine: Engine, state: JoinedState, row: Row
  ) -> tuple[Engine, JoinedState, Inputs]:
    """Returns engine, first state and arrays of the engine's causal pass."""
    engine = engine._replace(
      result=SUMS,
      chunk_size=self.plan.chunk_size,
      is_strict=self.is_strict,
      is_reversed=self.is_reversed,
    )
    length = row.query.shape[1]
    part = lambda x, start: jax.lax.slice_in_dim(
      x, start, start + length, axis=1
    )
    key, value, key_mask = (
      part(x, self.key_start) for x in (row.key, row.value, row.key_mask)
    )
    ids = None
    if row.segment is not None:
      own = part(row.segment, self.own_start)
      # A key that was moved out of its segment is seen by no query.
      key_mask &= part(row.segment, self.key_start) == own
      ids = own, own
      first = own[:, -1] if self.is_reversed else own[:, 0]
      state = state._replace(segment=first)
    return engine, state, Inputs(row.query, key, value, key_mask, ids)


class WholePass(NamedTuple):
  """A pass in which every query sees every key; static.

  Attributes:
    key_cut: blocks of keys.
    query_cut: blocks of queries.
  """

  key_cut: blocks.Blocks
  query_cut: blocks.Blocks

  def forward(
    self, engine: Engine, constants: PyTree, state: JoinedState, row: Row
  ) -> tuple[Array, JoinedState, PassSaved]:
    """See `CausalPass.forward`."""
    keys = row.key, row.value, row.key_mask
    state, exponent = bidirectional.sum_keys(
      self.key_cut, self._of(engine, self.key_cut), constants, state, keys
    )
    sums, (_, saved) = bidirectional.read_queries(
      self.query_cut,
      jnp.dtype(jnp.float32),
      self._of(engine, self.query_cut),
      constants,
      state,
      row.query,
      jnp.asarray(0),
    )
    return sums, state, (state, exponent, saved)

  def backward(
    self,
    engine: Engine,
    constants: PyTree,
    state: JoinedState,
    row: Row,
    saved: PassSaved,
    out: Array,
    divisor: Array,
    d_out: Array,
    d_after: JoinedState,
  ) -> Gradients:
    """See `CausalPass.backward`."""
    after, exponent, (_, query_exponent) = saved
    of_queries = self._of(engine, self.query_cut)
    normalizer = self.query_cut.stacked(divisor, of_queries.chunk_size)
    position = jnp.asarray(0)
    d_read, d_last, d_query, _ = bidirectional.read_backward(
      self.query_cut,
      of_queries,
      (constants, after, row.query, position),
      (out, Saved(normalizer, query_exponent)),
      d_out,
    )
    linear = leaves.tree_add(d_last.linear, d_after.linear)
    d_sums, d_state, (d_key, d_value, _) = bidirectional.sum_backward(
      self.key_cut,
      self._of(engine, self.key_cut),
      (constants, state, (row.key, row.value, row.key_mask)),
      exponent,
      after.with_linear(linear),
    )
    floats = leaves.tree_add(jax.tree.leaves(d_read), jax.tree.leaves(d_sums))
    return Gradients(floats, d_state.linear, d_query, d_key, d_value)

  def _of(self, engine: Engine, cut: blocks.Blocks) -> Engine:
    return engine._replace(result=SUMS, chunk_size=cut.size)


Pass = CausalPass | WholePass
