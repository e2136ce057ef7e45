"""Spectral attention: linear attention on the features of a feature map."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, Required, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from spectraformer_jax import checks, meshes
from spectraformer_jax.attention_checks import (
  check_spectral_inputs,
  check_stats_of_map,
)
from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.feature_maps.feature_map import FeatureMap, Prepared
from spectraformer_jax.feature_maps.prepared import as_variables
from spectraformer_jax.hybrid_attention.attend import attend as attend_hybrid
from spectraformer_jax.hybrid_attention.exact_keys import (
  ExactKeys,
  Window,
  check_exact_keys,
  exact_keys_of,
  kernel_of,
)
from spectraformer_jax.hybrid_attention.layout import Setting
from spectraformer_jax.hybrid_attention.state import (
  HybridState,
  check_state,
  without_tokens,
)
from spectraformer_jax.linear_attention.api import AttendOptions, attend
from spectraformer_jax.linear_attention.empty import attend_empty
from spectraformer_jax.linear_attention.implementations import names_of
from spectraformer_jax.linear_attention.inputs import Maps
from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  LogFeatures,
  Mask,
  PyTree,
  SegmentIds,
  Side,
)


class SpectralOptions(TypedDict, total=False):
  """Keyword arguments of `spectral_attention`, except `return_state`."""

  feature_map: Required[FeatureMap]
  variables: Required[FeatureVariables]
  stats: PyTree
  scale: float | Array | None
  is_causal: bool
  key_mask: Mask
  query_mask: Mask
  segment_ids: SegmentIds | None
  initial_state: State | HybridState | None
  window: Window
  num_sinks: int
  num_heavy: int
  chunk_size: int | None
  implementation: str | Sequence[str] | None


@overload
def spectral_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  return_state: Literal[False] = False,
  **options: Unpack[SpectralOptions],
) -> Array: ...


@overload
def spectral_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  return_state: Literal[True],
  **options: Unpack[SpectralOptions],
) -> tuple[Array, State | HybridState]: ...


def spectral_attention(
  query: Float[Array, "B T NG H"],
  key: Float[Array, "B S N H"],
  value: Float[Array, "B S N V"],
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | Float[Array, ""] | None = None,
  is_causal: bool = False,
  key_mask: Bool[Array, "B S"] | None = None,
  query_mask: Bool[Array, "B T"] | None = None,
  segment_ids: Int[Array, "B T"]
  | tuple[Int[Array, "B T"], Int[Array, "B S"]]
  | None = None,
  initial_state: State | HybridState | None = None,
  return_state: bool = False,
  window: Window = None,
  num_sinks: int = 0,
  num_heavy: int = 0,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> (
  Float[Array, "B T NG V"]
  | tuple[Float[Array, "B T NG V"], State | HybridState]
):
  r"""Computes random-feature attention, in time and memory O(T).

  Estimates :func:`exact_attention` for the kernel of `feature_map`: queries
  and keys are scaled once, mapped to features, and attended linearly. Features
  are computed chunk by chunk, so they never exist all at once. Powers of two,
  which cancel exactly, keep features within the range of float32.

  Args:
    query: ``[B, T, N, H]``, any float dtype; N may be G times the number of key
      heads (grouped-query attention: query head n uses key head n // G).
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N or 1)``.
    stats: data-dependent parameters. None: if the map needs them and attention
      is neither causal nor packed, they are computed from the visible keys of
      each example. Queries do not count, since in a decoder a query must not
      depend on later ones. In an encoder they may count: pass
      ``stats=feature_map.calibrate(variables, query * c, key * c)`` with
      ``c = sqrt(scale)``.
    scale: of ``query . key``, a number or a scalar array (which takes a
      gradient); None means ``1 / sqrt(H)``.
    is_causal: query i sees keys 0..i: no query sees keys from T on, and queries
      from S on see all keys.
    key_mask: ``[B, S]`` bool, True where a key may be seen. The content of
      masked keys and values has no influence, NaN included.
    query_mask: ``[B, T]`` bool: False for queries whose output is zeros.
    segment_ids: ints ``[B, T]`` of packed rows (T == S), or a pair
      ``([B, T], [B, S])``; a query sees keys of its own segment only.
    initial_state: from an earlier call with `return_state`; its keys precede
      these.
    return_state: whether to return the state after all S keys as well, for
      `decode_step` and `attend_state`.
    window: keys near a query that are exact: those at most `window` positions
      before or after it, or ``(left, right)``. 0 is the query's own key alone,
      None is no window. Keys outside of it are estimated, not hidden. With
      is_causal no later key is seen. Positions are those of the row, hidden
      ones included, and in packed rows those of the segment.
    num_sinks: number of first visible keys (of each segment) that are exact for
      all queries.
    num_heavy: number of keys, for each example and key head, that are exact for
      all queries: those likely to get most attention. It is for attention that
      is neither causal nor packed.
    chunk_size: positions in one chunk; None: the platform's default.
    implementation: "xla", "reference", "pallas_tpu", "pallas_gpu", a sequence
      to try in order, or None for the best available.

  Returns:
    ``[B, T, N, V]`` in value's dtype. A query that sees no key gives zeros and
    zero gradients. With `return_state`, a pair with the `State`, which is a
    `HybridState` if there are exact keys.

  Raises:
    ValueError: shapes that do not agree, arrays that are not float, a mask over
      query and key positions, stats of another map, stats that would depend on
      future keys, on other segments or (with a state) on the keys of a
      single call, a state of another map or together with segments, exact
      keys that the call cannot have, or an implementation that cannot run.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("oprf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8, num_heads=2)
    >>> x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
    >>> spectral_attention(x, x, x, feature_map=fm, variables=v).shape
    (1, 5, 2, 8)
  """
  arrays = checks.attention_arrays(
    query,
    key,
    value,
    key_mask=key_mask,
    query_mask=query_mask,
    segment_ids=segment_ids,
  )
  variables = as_variables(variables)
  checks.check_bool("return_state", return_state)
  has_state = return_state or initial_state is not None
  check_spectral_inputs(
    arrays, feature_map, variables, stats, is_causal, has_state
  )
  component = feature_map.component
  exact = exact_keys_of(window, num_sinks, num_heavy, is_causal=is_causal)
  if not exact.are_none:
    kernel_of(component)
    check_exact_keys(exact, arrays, is_causal=is_causal, has_state=has_state)
  if exact.window is not None and isinstance(arrays.segment_ids, tuple):
    # The same array twice: inside of jit it would be two.
    arrays = arrays._replace(segment_ids=arrays.segment_ids[0])
  if initial_state is not None:
    check_state(initial_state, exact)
  if component.longest is not None and initial_state is not None:
    before = checks.static_position(initial_state.length)
    component.check_length(before + query.shape[1])
  sqrt_scale, factor = checks.split_scale(scale, query.shape[-1])
  query, key = (
    checks.times_factor(x, factor) for x in (arrays.query, arrays.key)
  )
  if checks.is_empty(query, key, arrays.value):
    if isinstance(initial_state, HybridState):
      out, state = without_tokens(query, arrays.value, initial_state)
      return (out, state) if return_state else out
    return attend_empty(
      functools.partial(
        spectral_attention,
        feature_map=feature_map,
        variables=variables,
        # The array part of the scale is in query and key already.
        scale=sqrt_scale**2,
        is_causal=is_causal,
        window=window,
        num_sinks=num_sinks,
        num_heavy=num_heavy,
        chunk_size=chunk_size,
        implementation=implementation,
      ),
      query,
      key,
      arrays.value,
      key_mask=arrays.key_mask,
      initial_state=initial_state,
      return_state=return_state,
      stats=stats,
      query_mask=arrays.query_mask,
      segment_ids=arrays.segment_ids,
    )
  out, state = _spectral_attention(
    arrays._replace(query=query, key=key),
    variables,
    stats,
    initial_state,
    feature_map=feature_map,
    sqrt_scale=sqrt_scale,
    exact=exact,
    options=AttendOptions(
      is_causal=is_causal,
      return_state=return_state,
      chunk_size=chunk_size,
      implementation=names_of(implementation),
      is_signed=not feature_map.info.positive,
    ),
  )
  return (out, state) if return_state else out


# Jitted, so that a call outside of jit is compiled, too, and only once.
@functools.partial(
  jax.jit, static_argnames=("feature_map", "sqrt_scale", "exact", "options")
)
def _spectral_attention(
  arrays: AttentionArrays,
  variables: FeatureVariables,
  stats: PyTree,
  initial_state: State | HybridState | None,
  *,
  feature_map: FeatureMap,
  sqrt_scale: float,
  exact: ExactKeys,
  options: AttendOptions,
) -> tuple[Array, State | HybridState | None]:
  """Computes `spectral_attention` of checked arguments."""
  check_stats_of_map(feature_map, variables, stats, arrays.key)

  def on_one_device(
    query: Array,
    key: Array,
    value: Array,
    variables: FeatureVariables,
    by_example_and_head: tuple[PyTree, State | HybridState | None],
    masks: tuple[Mask, Mask, SegmentIds | None],
  ) -> tuple[Array, State | HybridState | None]:
    stats, initial_state = by_example_and_head
    key_mask, query_mask, segment_ids = masks
    query = with_zeros(query, query_mask)
    stats = statistics_of_keys(
      feature_map, variables, stats, key, key_mask, sqrt_scale
    )
    arguments = (
      options,
      feature_map.prepare(variables, stats),
      initial_state,
      AttentionArrays(query, key, value, *masks),
    )
    if exact.are_none:
      out, state = attend(maps_of(feature_map, sqrt_scale), *arguments)
    else:
      setting = Setting(
        exact,
        is_causal=options.is_causal,
        kernel=kernel_of(feature_map.component),
        sqrt_scale=sqrt_scale,
        num_rows=feature_map.num_rows,
      )
      maps = maps_of(feature_map, sqrt_scale, is_complete=True)
      out, state = attend_hybrid(maps, setting, *arguments)
    # A traced position has not been checked: outputs beyond `longest` are NaN.
    longest = feature_map.component.longest
    if longest is not None and initial_state is not None:
      position = initial_state.length + jnp.arange(query.shape[1])
      is_mapped = (position < longest)[None, :, None, None]
      out = jnp.where(is_mapped, out, jnp.nan)
    return with_zeros(out, query_mask), state

  return meshes.on_shards(
    on_one_device,
    *arrays[:3],
    by_head=variables,
    by_example_and_head=(stats, initial_state),
    by_example=arrays[3:],
  )


def with_zeros(x: Array, mask: Mask) -> Array:
  """Returns x ``[B, T, ...]`` with zeros where `mask` ``[B, T]`` is False."""
  return x if mask is None else jnp.where(mask[:, :, None, None], x, 0)


def implied_attention_weights(
  query: Float[Array, "B T NG H"],
  key: Float[Array, "B S N H"],
  **options: Unpack[SpectralOptions],
) -> Float[Array, "B NG T S"]:
  """Returns the T x S weights that `spectral_attention` applies, for analysis.

  Args:
    query: ``[B, T, N, H]``.
    key: ``[B, S, N, H]``.
    **options: keyword arguments of `spectral_attention`.

  Returns:
    ``[B, N, T, S]`` float32: memory grows with T S.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8)
    >>> x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
    >>> w = implied_attention_weights(x, x, feature_map=fm, variables=v)
    >>> bool(jnp.allclose(w.sum(-1), 1.0, atol=1e-5))
    True
  """
  query, key = checks.as_floats(query=query, key=key)
  checks.check_attention_inputs(query, key, key)
  batch, length, heads = key.shape[:3]
  eye = jnp.eye(length, dtype=jnp.float32)[None, :, None, :]
  value = jnp.broadcast_to(eye, (batch, length, heads, length))
  out = spectral_attention(query, key, value, **options)
  return jnp.swapaxes(out, 1, 2)


@dataclasses.dataclass(frozen=True)
class _OneSide:
  """The feature map of one side, for unscaled inputs; a static argument."""

  feature_map: FeatureMap
  sqrt_scale: float
  is_complete: bool
  side: Side

  def __call__(
    self, prepared: Prepared, x: Array, position: Array | int
  ) -> LogFeatures:
    """Computes float32 features of one chunk ``[B, N, C, H]`` of any dtype."""
    if self.feature_map.component.info.positional:
      position = jnp.asarray(position)[None, None]
      state = prepared.state._replace(position=position)
      prepared = prepared._replace(state=state)
    x = x.astype(jnp.float32) * self.sqrt_scale
    return self.feature_map.prepared_features(
      prepared, x, side=self.side, for_attention=not self.is_complete
    )


def maps_of(
  feature_map: FeatureMap, sqrt_scale: float, *, is_complete: bool = False
) -> Maps:
  """Returns both sides of a feature map, for linear attention.

  Args:
    feature_map: the map.
    sqrt_scale: multiplies queries and keys.
    is_complete: whether queries keep the factors that cancel in linear
      attention; beside exact weights these do not cancel.
  """
  of_side = functools.partial(_OneSide, feature_map, sqrt_scale, is_complete)
  return Maps(of_side("query"), of_side("key"))


def statistics_of_keys(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree,
  key: Array,
  key_mask: Mask,
  sqrt_scale: float,
) -> PyTree:
  """Returns `stats`; if None and the map needs any, those of the visible keys.

  Keys take the place of queries, too. Statistics of all queries would make each
  query depend on the others, also on later ones in a decoder's cross-attention.
  """
  if stats is not None or not feature_map.info.needs_stats:
    return stats
  key = key.astype(jnp.float32) * sqrt_scale
  return feature_map.calibrate(
    variables, key, key, key_mask=key_mask, query_mask=key_mask
  )
