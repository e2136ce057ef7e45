"""The state of causal hybrid attention: sums, and the keys that are exact."""

from typing import NamedTuple

import jax.numpy as jnp

from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.typing import Array


class HybridState(NamedTuple):
  """What `decode_step` needs to know of all earlier keys; of constant size.

  Keys and values are kept as they came: in their own dtype, without the scale.
  The window has L positions before a query's own, and there are P sinks.

  Attributes:
    far: sums over the keys that are neither in the window nor sinks.
    ring_key: the last L keys, the oldest first, ``[B, N, L, H]``; None without
      a window.
    ring_value: their values, ``[B, N, L, V]``.
    ring_visible: bool ``[B, 1, L]``: False before the first position, for
      masked keys and for sinks.
    sink_key: the first P visible keys, ``[B, N, P, H]``.
    sink_value: their values, ``[B, N, P, V]``.
    sink_count: how many sinks there are so far, int32 ``[B, 1]``.
  """

  far: State
  ring_key: Array | None
  ring_value: Array | None
  ring_visible: Array | None
  sink_key: Array
  sink_value: Array
  sink_count: Array

  @property
  def length(self) -> Array:
    """Number of positions seen so far, int32 scalar."""
    return self.far.length

  @property
  def exact_keys(self) -> ExactKeys:
    """The window and the number of sinks that the state was made with."""
    ring = self.ring_key
    window = None if ring is None else (ring.shape[2], 0)
    return ExactKeys(window, self.sink_key.shape[2])


def empty_state(
  far: State, exact: ExactKeys, head_dim: int, dtypes: tuple
) -> HybridState:
  """Returns the state before any key.

  Args:
    far: sums without keys.
    exact: window and number of sinks.
    head_dim: H.
    dtypes: of keys and of values.
  """
  batch, heads, _, value_dim = far.kv.shape
  key_dtype, value_dtype = dtypes
  zeros = lambda length, depth, dtype: jnp.zeros(
    (batch, heads, length, depth), dtype
  )
  ring = (None, None, None)
  if exact.window is not None:
    ring = (
      zeros(exact.left, head_dim, key_dtype),
      zeros(exact.left, value_dim, value_dtype),
      jnp.zeros((batch, 1, exact.left), bool),
    )
  return HybridState(
    far,
    *ring,
    zeros(exact.num_sinks, head_dim, key_dtype),
    zeros(exact.num_sinks, value_dim, value_dtype),
    jnp.zeros((batch, 1), jnp.int32),
  )


def check_state(
  state: State | HybridState, exact: ExactKeys
) -> State | HybridState:
  """Returns the state; ValueError if it was made with other exact keys."""
  made_with = (
    state.exact_keys if isinstance(state, HybridState) else ExactKeys()
  )
  if made_with == exact:
    return state
  raise ValueError(
    f"initial_state was made with window={_left_of(made_with)}, "
    f"num_sinks={made_with.num_sinks}; this call has window={_left_of(exact)}, "
    f"num_sinks={exact.num_sinks}."
  )


def without_tokens(
  query: Array, value: Array, state: HybridState
) -> tuple[Array, HybridState]:
  """Returns output and state of a call without examples or positions.

  Raises:
    ValueError: the call has examples and positions, so another axis has size 0.
  """
  batch, length, heads, _ = query.shape
  if batch and length:
    raise ValueError(
      "a state with window or num_sinks needs heads and dims of at least 1, "
      f"got query.shape={query.shape}, value.shape={value.shape}."
    )
  out = jnp.zeros((batch, length, heads, value.shape[-1]), value.dtype)
  far = state.far._replace(length=state.length + length)
  return out, state._replace(far=far)


def _left_of(exact: ExactKeys) -> int | None:
  return None if exact.window is None else exact.left
