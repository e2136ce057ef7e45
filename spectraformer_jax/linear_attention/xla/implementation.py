"""Attention in plain XLA: packed rows, causal, or every key."""

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.inputs import Call, Inputs
from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.linear_attention.xla import bidirectional, blocks
from spectraformer_jax.linear_attention.xla.causal import causal
from spectraformer_jax.linear_attention.xla.segments import packed
from spectraformer_jax.typing import Array


def attend(call: Call) -> tuple[Array, State]:
  """Maps queries and keys to features, and attends; see `Implementation`.

  With segments the state is returned as it was, because a state is the sum of
  one row.
  """
  state, inputs = call.state, call.inputs
  if inputs.segment_ids is not None:
    return packed(call), state
  if not call.is_causal:
    state = bidirectional.accumulate(call)
    return bidirectional.read(call._replace(state=state), jnp.asarray(0)), state
  length, num_keys = inputs.query.shape[1], inputs.key.shape[1]
  if length == num_keys:
    return causal(call)
  # The causal triangle starts at the top left, whatever T and S are.
  common_length = min(length, num_keys)
  keys = jax.tree.map(lambda x: x[:, :common_length], inputs.keys)
  # Queries from S on see all keys: the keys at their positions are padding.
  earlier = Inputs(inputs.query, *blocks.pad_keys(keys, length), None)
  out, state = causal(call._replace(inputs=earlier))
  state = state._replace(length=call.state.length + common_length)
  if common_length < num_keys:
    # Keys from T on are seen by no query, but belong to the state.
    key, value, key_mask = jax.tree.map(
      lambda x: x[:, common_length:], inputs.keys
    )
    later = Inputs(inputs.query, key, value, key_mask, None)
    state = bidirectional.accumulate(call._replace(state=state, inputs=later))
  return out, state
