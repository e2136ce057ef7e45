"""Attention on arrays with an axis of size 0."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.typing import Array, PyTree


def attend_empty(
  attention: Callable[..., Any],
  query: Array,
  key: Array,
  value: Array,
  *,
  key_mask: Array | None,
  initial_state: State | None,
  return_state: bool,
  **others: PyTree,
) -> Any:
  """Attends with one zero on each axis of size 0, and cuts it off again.

  A query that sees no key gives zeros. A call without keys leaves the state as
  it was.

  Args:
    attention: takes all other arguments.
    query: ``[B, T, N, H]``.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    key_mask: ``[B, S]`` bool or None.
    initial_state: a state or None.
    return_state: also return the state.
    **others: other arguments; axes of size 0 of their arrays get a zero, too.

  Returns:
    The results of `attention`.
  """
  length = key.shape[1]
  if key_mask is None and not length:
    key_mask = jnp.zeros(key.shape[:2], bool)
  out = attention(
    *map(_filled, (query, key, value)),
    key_mask=None if key_mask is None else _filled(key_mask),
    initial_state=_filled_state(initial_state),
    return_state=return_state,
    **jax.tree.map(_filled, others),
  )
  out, state = out if return_state else (out, None)
  batch, heads, value_dim = *key.shape[::2], value.shape[3]
  out = out[:batch, : query.shape[1], : query.shape[2], :value_dim]
  if state is None:
    return out
  before = 0 if initial_state is None else initial_state.length
  state = jax.tree.map(
    lambda leaf: leaf[:batch, :heads] if leaf.ndim else leaf, state
  )
  rest = state.rest
  return out, state._replace(
    kv=state.kv[..., :value_dim],
    length=jnp.int32(before + length),
    rest=None if rest is None else rest[..., -(value_dim + 1) :],
  )


def _filled_state(state: State | None) -> State | None:
  """Fills a state; for V = 0, `rest` gets a column before that of `total`."""
  filled = jax.tree.map(_filled, state)
  if state is None or state.rest is None or state.kv.shape[-1]:
    return filled
  rest = jnp.pad(filled.rest, [(0, 0), (0, 0), (0, 0), (1, 0)])
  return filled._replace(rest=rest)


def _filled(x: Array) -> Array:
  """Adds one zero (False) on each axis of size 0."""
  if 0 not in x.shape:
    return x
  return jnp.pad(x, [(0, int(size == 0)) for size in x.shape])
