r"""Sums of features over far keys, in passes of the linear attention engine.

A query sees by features the keys that are neither in its window nor special.
With l positions of the window before a query, the far keys before query i are
those at j < i - l. If all keys move l places towards the end, these are the
keys before place i, which is what a causal pass sums:

    place   0  1  2  3  4  5         l = 2: query 5 sees keys 3, 4 and 5 exactly
    query   0  1  2  3  4 [5]
    moved        [0  1  2] 3            and keys 0, 1 and 2 by features

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
from spectraformer_jax.linear_attention.xla.causal import Gradients
from spectraformer_jax.linear_attention.xla.chunks import Engine, Saved
from spectraformer_jax.linear_attention.xla.plan import CausalPlan
from spectraformer_jax.linear_attention.xla.results import SUMS
from spectraformer_jax.typing import Array, PyTree

# What a pass keeps for its backward pass.
PassSaved = PyTree


class PartGradient(NamedTuple):
  """What gives the gradient of one part of a quotient.

  Attributes:
    out: the quotient of all parts, ``[B, T, N G, V]``.
    divisor: its divisor in the units of this part, ``[B, T, N G, 1]``.
    d_out: the gradient of `out`.
  """

  out: Array
  divisor: Array
  d_out: Array


class CausalPass(NamedTuple):
  """A pass over moved keys; static.

  Attributes:
    plan: its sizes.
    cut: its steps, as blocks of queries and of moved keys.
    own_start: place in the row's key array of the first query's own key.
    is_strict: whether a query sees no key at its own place.
    length: number of queries without padding.
  """

  plan: CausalPlan
  cut: blocks.Blocks
  own_start: int
  is_strict: bool
  length: int

  def forward(
    self, engine: Engine, constants: PyTree, state: JoinedState, row: Row
  ) -> tuple[Array, JoinedState, PassSaved]:
    """Returns columns of sums, the state after all keys, and what is saved."""
    engine, state, inputs = self._moved(engine, state, row)
    after, sums, saved = causal.forward_loop(
      self.plan, self.cut, engine, constants, state, inputs
    )
    return sums, after, saved

  def backward(
    self,
    engine: Engine,
    primals: tuple[PyTree, JoinedState, Row],
    saved: PassSaved,
    part: PartGradient,
    total: Gradients,
  ) -> Gradients:
    """Adds gradients; see `causal.backward_loop`.

    Args:
      engine: see `forward`.
      primals: constants, state and row of `forward`.
      saved: the last result of `forward`.
      part: gives the gradients of the sums.
      total: the gradients to which these are added.
    """
    constants, state, row = primals
    engine, state, inputs = self._moved(engine, state, row)
    before_strides, (_, query_exponent) = saved
    normalizer = self.cut.stacked(part.divisor[..., 0], engine.chunk_size)
    steps = self.plan.num_strides, self.plan.steps_per_stride
    normalizer = normalizer.reshape(*steps, *normalizer.shape[1:])
    of_strides = before_strides, Saved(normalizer, query_exponent)
    return causal.backward_loop(
      self.plan,
      self.cut,
      engine,
      (constants, state, inputs),
      (part.out, of_strides),
      part.d_out,
      total,
      self.cut.add,
    )

  def _moved(
    self, engine: Engine, state: JoinedState, row: Row
  ) -> tuple[Engine, JoinedState, Inputs]:
    """Returns engine, first state and arrays of the engine's causal pass."""
    engine = engine._replace(result=SUMS, is_strict=self.is_strict)
    key_mask, ids = row.key_mask, None
    # A key at a padded place stays in the window: the state must not count it.
    place = jnp.arange(key_mask.shape[1]) - self.cut.key_start
    is_moved = jnp.expand_dims(
      place < self.length, (0, *range(2, key_mask.ndim))
    )
    key_mask &= is_moved
    if row.segment is not None:
      own = row.segment[:, self.own_start :][:, : self.cut.length]
      # A key that was moved out of its segment is seen by no query.
      distance = self.cut.key_start - self.own_start
      key_mask &= jnp.roll(row.segment, distance, axis=1) == row.segment
      ids = own, own
      first = own[:, -1] if self.cut.is_reversed else own[:, 0]
      state = state._replace(segment=first)
    inputs = Inputs(row.query, row.key, row.value, key_mask, ids)
    return engine, state, inputs


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
    primals: tuple[PyTree, JoinedState, Row],
    saved: PassSaved,
    part: PartGradient,
    total: Gradients,
  ) -> Gradients:
    """See `CausalPass.backward`."""
    (constants, state, row), (floats, linear, of_arrays) = primals, total
    after, exponent, (_, query_exponent) = saved
    of_queries = self._of(engine, self.query_cut)
    normalizer = self.query_cut.stacked(
      part.divisor[..., 0], of_queries.chunk_size
    )
    d_read, d_last, d_query, _ = bidirectional.read_backward(
      self.query_cut,
      of_queries,
      (constants, after, row.query, jnp.asarray(0)),
      (part.out, Saved(normalizer, query_exponent)),
      part.d_out,
    )
    linear = leaves.tree_add(d_last.linear, linear)
    d_sums, d_state, (d_key, d_value, _) = bidirectional.sum_backward(
      self.key_cut,
      self._of(engine, self.key_cut),
      (constants, state, (row.key, row.value, row.key_mask)),
      exponent,
      after.with_linear(linear),
    )
    for more in (d_read, d_sums):
      floats = leaves.tree_add(floats, jax.tree.leaves(more))
    of_arrays = leaves.tree_add(of_arrays, [d_query, d_key, d_value])
    return floats, d_state.linear, of_arrays

  def _of(self, engine: Engine, cut: blocks.Blocks) -> Engine:
    return engine._replace(result=SUMS, chunk_size=cut.size)


Pass = CausalPass | WholePass
