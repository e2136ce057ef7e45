"""Attention token by token, with a state of constant size."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from spectraformer_jax import checks
from spectraformer_jax.attention import maps_of, spectral_attention
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.prepared import as_variables
from spectraformer_jax.hybrid_attention.exact_keys import (
  ExactKeys,
  Window,
  exact_keys_of,
  kernel_of,
)
from spectraformer_jax.hybrid_attention.state import HybridState, empty_state
from spectraformer_jax.linear_attention.api import start
from spectraformer_jax.linear_attention.state import State, with_rest
from spectraformer_jax.typing import Array, FeatureVariables, PyTree


def init_state(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  *,
  batch_size: int,
  num_heads: int,
  head_dim: int,
  value_dim: int | None = None,
  stats: PyTree = None,
  window: Window = None,
  num_sinks: int = 0,
) -> State | HybridState:
  """Returns the state before the first token, for `decode_step`.

  Args:
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: the map's variables.
    batch_size: B.
    num_heads: N of keys and values.
    head_dim: H.
    value_dim: V; None means H.
    stats: data-dependent parameters, if the map needs them.
    window: see `spectral_attention`; the state keeps as many keys.
    num_sinks: see `spectral_attention`; the state keeps as many keys.

  Returns:
    An empty `State`, or with a window or sinks an empty `HybridState`; its size
    does not depend on the number of tokens.

  Raises:
    ValueError: a size, window or number is not valid, or the map has no
      exact kernel to go with a window or sinks.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8)
    >>> state = init_state(fm, v, batch_size=1, num_heads=2, head_dim=8)
    >>> x = jnp.ones((1, 1, 2, 8))
    >>> out, state = decode_step(
    ...   state, x, x, x, feature_map=fm, variables=v)
    >>> out.shape, int(state.length)
    ((1, 1, 2, 8), 1)
  """
  checks.check_size("batch_size", batch_size)
  checks.check_positive_int("num_heads", num_heads)
  checks.check_positive_int("head_dim", head_dim)
  if value_dim is None:
    value_dim = head_dim
  variables = as_variables(variables)
  exact = exact_keys_of(window, num_sinks, 0, is_causal=True)
  # Before the first token only shapes matter, so the scale may be 1.
  key = jax.ShapeDtypeStruct((batch_size, 1, num_heads, head_dim), jnp.float32)
  state = start(
    maps_of(feature_map, 1.0),
    feature_map.prepare(variables, stats),
    key,
    value_dim,
    is_signed=not feature_map.info.positive,
  )
  # `decode_step` keeps the rounding errors of its sums in `State.rest`.
  state = with_rest(state)
  if exact.are_none:
    return state
  kernel_of(feature_map.component)
  return empty_state(state, exact, head_dim, (jnp.float32, jnp.float32))


def decode_step(
  state: State | HybridState,
  query: Float[Array, "B 1 NG H"],
  key: Float[Array, "B 1 N H"],
  value: Float[Array, "B 1 N V"],
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | Float[Array, ""] | None = None,
) -> tuple[Float[Array, "B 1 NG V"], State | HybridState]:
  """Attends with one more token, in O(M V) however many came before.

  A `HybridState` holds its window and sinks; each key in them costs a score.

  Args:
    state: from `init_state`, `decode_step`, or ``spectral_attention(...,
      is_causal=True, return_state=True)`` on the prompt.
    query: ``[B, 1, N, H]``.
    key: ``[B, 1, N, H]``.
    value: ``[B, 1, N, V]``.
    feature_map: see `spectral_attention`.
    variables: the same as for earlier tokens.
    stats: the same as for earlier tokens.
    scale: see `spectral_attention`.

  Returns:
    ``[B, 1, N, V]`` in value's dtype, and the state with the token in it.

  Raises:
    ValueError: more than one token, shapes that do not agree, or a position
      beyond the component's longest sequence. If the position is known only at
      run time, the output is NaN instead.

  Example: see `init_state`.
  """
  arrays = checks.attention_arrays(query, key, value)
  if arrays.query.shape[1] != 1 or arrays.key.shape[1] != 1:
    raise ValueError(
      "decode_step takes one token, got query.shape="
      f"{arrays.query.shape}; use spectral_attention(is_causal=True, "
      "initial_state=state, return_state=True) for more."
    )
  exact = state.exact_keys if isinstance(state, HybridState) else ExactKeys()
  return spectral_attention(
    *arrays[:3],
    feature_map=feature_map,
    variables=variables,
    stats=stats,
    scale=scale,
    is_causal=True,
    initial_state=state,
    return_state=True,
    window=exact.window,
    num_sinks=exact.num_sinks,
    chunk_size=1,
  )


def attend_state(
  state: State,
  query: Float[Array, "B T NG H"],
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | Float[Array, ""] | None = None,
) -> Float[Array, "B T NG V"]:
  """Attends to all keys of a state, in O(T M V).

  For a decoder's cross-attention: ``spectral_attention(...,
  return_state=True)`` sums over the encoder's keys once, and each step of the
  decoder reads the sums.

  Args:
    state: a `State`, sums over keys and values; not a `HybridState`, to which
      only `decode_step` can attend.
    query: ``[B, T, N, H]``; N may be a multiple of the state's number of heads.
    feature_map: see `spectral_attention`.
    variables: the same as for the keys.
    stats: the same as for the keys; required if the map needs any.
    scale: the same as for the keys.

  Returns:
    ``[B, T, N, V]`` in query's dtype, as `spectral_attention` computes it for
    these queries and the keys of the state, with is_causal=False.

  Raises:
    ValueError: shapes that do not agree, missing stats, or a `HybridState`.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=32)
    >>> maps = {"feature_map": fm, "variables": fm.init(
    ...   jax.random.key(0), head_dim=8)}
    >>> x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
    >>> out, state = sf.spectral_attention(x, x, x, return_state=True, **maps)
    >>> bool(jnp.allclose(attend_state(state, x, **maps), out, atol=1e-5))
    True
  """
  # The call itself has no keys: their axis has size 0.
  (query,) = checks.as_floats(query=query)
  if isinstance(state, HybridState):
    raise ValueError(
      "attend_state takes a State, got a HybridState: window and num_sinks "
      "carry over only with is_causal=True; use decode_step."
    )
  batch, heads, _, value_dim = state.kv.shape
  shape = (batch, 0, heads, query.shape[-1] if query.ndim else 0)
  return spectral_attention(
    query,
    jnp.zeros(shape, query.dtype),
    jnp.zeros((*shape[:3], value_dim), query.dtype),
    feature_map=feature_map,
    variables=variables,
    stats=stats,
    scale=scale,
    initial_state=state,
  )
