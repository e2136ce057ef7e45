"""Options that choose exact keys; states of rows with different lengths."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import (
  ExactKeys,
  check_heavy,
  exact_keys_of,
  kernel_of,
)
from spectraformer_jax.hybrid_attention.state import HybridState
from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.typing import Array

# The options are the fields of this record.
OPTIONS = ExactKeys._fields


def options_of(source: Any) -> dict[str, Any]:
  """Returns the options that the attributes of `source` have, by name."""
  return {name: getattr(source, name) for name in OPTIONS}


def check_options(
  options: dict[str, Any],
  attention: str,
  feature_map: FeatureMap | None,
  *,
  is_causal: bool,
) -> None:
  """Raises ValueError for exact keys that an attention cannot have.

  Args:
    options: values of all `OPTIONS`, by name.
    attention: the name of the attention.
    feature_map: None unless attention is "spectral".
    is_causal: whether no query sees later keys.
  """
  exact = exact_keys_of(**options, is_causal=is_causal)
  if exact.are_none:
    return
  if feature_map is None:
    given = ", ".join(
      f"{name}={value!r}"
      for name, value in options.items()
      if value != ExactKeys._field_defaults[name]
    )
    raise ValueError(
      f"{given} with attention={attention!r}: these options need "
      "attention='spectral', which estimates all keys but the exact ones."
    )
  kernel_of(feature_map.component)
  check_heavy(exact, is_causal=is_causal)


def continue_rows(
  attend: Callable[..., tuple[Array, State | HybridState]],
  state: HybridState,
  query: Array,
  key: Array,
  value: Array,
  mask: Array,
) -> tuple[Array, HybridState]:
  """Attends so that each row continues from its own last real position.

  The window of `spectral_attention` counts hidden positions, too. Here they do
  not count: the keys of the state's ring (its window) come before the new ones,
  and sorting puts all hidden positions first, so that real ones lie side by
  side and the last ones are the next ring.

  Args:
    attend: causal attention that takes and returns a state.
    state: with a window.
    query: ``[B, T, N G, H]``.
    key: ``[B, T, N, H]``.
    value: ``[B, T, N, V]``.
    mask: ``[B, T]`` bool, True at real positions.

  Returns:
    ``[B, T, N G, V]`` and the next state.
  """
  ring_key, ring_value, ring_visible = (
    state.ring_key,
    state.ring_value,
    state.ring_visible,
  )
  assert (
    ring_key is not None and ring_value is not None and ring_visible is not None
  )
  ring_size = ring_key.shape[2]
  visible = jnp.concatenate([ring_visible[:, 0], mask], axis=1)
  order = jnp.argsort(visible, axis=1, stable=True)

  def joined(before: Array, x: Array) -> Array:
    before = jnp.swapaxes(before, 1, 2).astype(x.dtype)
    both = jnp.concatenate([before, x], axis=1)
    return jnp.take_along_axis(both, order[:, :, None, None], axis=1)

  batch, _, num_heads, head_dim = query.shape
  no_query = jnp.zeros((batch, num_heads, ring_size, head_dim), query.dtype)
  out, new = attend(
    joined(no_query, query),
    joined(ring_key, key),
    joined(ring_value, value),
    key_mask=jnp.take_along_axis(visible, order, axis=1),
    # The ring's keys are among those of this call, so they are hidden here.
    initial_state=state._replace(ring_visible=jnp.zeros_like(ring_visible)),
  )
  assert isinstance(new, HybridState)  # since `state` is one
  places = jnp.argsort(order, axis=1)[:, ring_size:]
  out = jnp.take_along_axis(out, places[:, :, None, None], axis=1)
  # This call has counted the positions of the ring a second time.
  return out, new._replace(far=new.far._replace(length=new.length - ring_size))
