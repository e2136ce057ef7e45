"""Spectral attention: a feature map, and linear attention on it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp

from spectraformer_jax import checks, meshes
from spectraformer_jax.attention_checks import (
  check_spectral_inputs,
  check_stats_of_map,
)
from spectraformer_jax.feature_maps.feature_map import FeatureMap, Prepared
from spectraformer_jax.feature_maps.prepared import as_variables
from spectraformer_jax.feature_maps.vmap_heads import queries_by_key_head
from spectraformer_jax.linear_attention.api import AttendOptions, attend
from spectraformer_jax.linear_attention.empty import attend_empty
from spectraformer_jax.linear_attention.implementations import names_of
from spectraformer_jax.linear_attention.state import Maps, State
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  LogFeatures,
  PyTree,
  Side,
)


# What comes out is known from `return_state`.
@overload
def spectral_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | Array | None = None,
  is_causal: bool = False,
  key_mask: Array | None = None,
  query_mask: Array | None = None,
  segment_ids: Array | tuple[Array, Array] | None = None,
  initial_state: State | None = None,
  return_state: Literal[False] = False,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Array: ...


@overload
def spectral_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | Array | None = None,
  is_causal: bool = False,
  key_mask: Array | None = None,
  query_mask: Array | None = None,
  segment_ids: Array | tuple[Array, Array] | None = None,
  initial_state: State | None = None,
  return_state: Literal[True],
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> tuple[Array, State]: ...


def spectral_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | Array | None = None,
  is_causal: bool = False,
  key_mask: Array | None = None,
  query_mask: Array | None = None,
  segment_ids: Array | tuple[Array, Array] | None = None,
  initial_state: State | None = None,
  return_state: bool = False,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Array | tuple[Array, State]:
  r"""Random-feature attention, O(T): the kernel trick run backwards.

  Estimates :func:`exact_attention` for the kernel of `feature_map`: queries
  and keys are scaled once, mapped to features, and attended linearly. Features
  are made chunk by chunk and never all exist; they are stabilised without
  approximation by powers of two that cancel exactly.

  Args:
    query: ``[B, T, N, H]``, any float dtype; N may be a multiple of the keys'
      heads (grouped-query attention: query head n uses key head n // G).
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N or 1)``.
    stats: data-dependent parameters; None computes them from the visible keys
      (each example for itself) where the map needs them and attention is
      neither causal nor packed. Queries do not count, since one must not know
      of another in a decoder; where all are seen together, as in an encoder,
      ``stats=feature_map.calibrate(variables, query * root, key * root)`` with
      ``root = sqrt(scale)`` counts them.
    scale: of ``query . key``, a number or a scalar array (which takes a
      gradient); None means ``1 / sqrt(H)``.
    is_causal: query i sees keys 0..i: keys from T on are seen by nobody, and
      queries from S on see all.
    key_mask: ``[B, S]`` bool, True where a key may be seen; acts on features.
      What hidden keys and values hold has no influence, NaN included.
    query_mask: ``[B, T]`` bool: queries that give outputs; others give zeros.
      None: all do.
    segment_ids: ints ``[B, T]`` of packed rows (T == S), or a pair
      ``([B, T], [B, S])``; a query sees keys of its own segment only.
    initial_state: of an earlier call with `return_state`: its keys come first.
    return_state: also return the state after all S keys, for `decode_step` and
      `attend_state`.
    chunk_size: positions in one chunk; None is a default for the backend.
    implementation: "xla", "reference", "pallas_tpu", "pallas_gpu", a sequence
      tried in order, or None for the best available.

  Returns:
    ``[B, T, N, V]`` in value's dtype. A query that sees no key gives zeros and
    zero gradients. With `return_state`, a pair with the `State`.

  Raises:
    ValueError: shapes that do not agree, arrays that are not float, a mask over
      query and key positions, statistics of other sizes or that would look at
      the future, at other packed rows or differ from call to call of a state,
      a state of another map or together with segments, or an implementation
      that cannot run.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("oprf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8, num_heads=2)
    >>> x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
    >>> spectral_attention(x, x, x, feature_map=fm, variables=v).shape
    (1, 5, 2, 8)
  """
  query, key, value = checks.as_floats(query=query, key=key, value=value)
  key_mask, query_mask = map(checks.as_array, (key_mask, query_mask))
  segment_ids = checks.as_segment_ids(segment_ids)
  variables = as_variables(variables)
  checks.check_bool("return_state", return_state)
  check_spectral_inputs(
    query,
    key,
    value,
    feature_map=feature_map,
    variables=variables,
    stats=stats,
    is_causal=is_causal,
    key_mask=key_mask,
    query_mask=query_mask,
    segment_ids=segment_ids,
    has_state=return_state or initial_state is not None,
  )
  component = feature_map.component
  if component.longest is not None and initial_state is not None:
    before = checks.known(initial_state.length)
    component.check_length(before + query.shape[1])
  root, computed = checks.scale_parts(scale, query.shape[-1])
  query, key = (checks.times_root(x, computed) for x in (query, key))
  if checks.is_empty(query, key, value):
    return attend_empty(
      functools.partial(
        spectral_attention,
        feature_map=feature_map,
        variables=variables,
        scale=root**2,
        is_causal=is_causal,
        chunk_size=chunk_size,
        implementation=implementation,
      ),
      query,
      key,
      value,
      key_mask=key_mask,
      initial_state=initial_state,
      return_state=return_state,
      stats=stats,
      query_mask=query_mask,
      segment_ids=segment_ids,
    )
  out, state = _spectral_attention(
    query,
    key,
    value,
    variables,
    stats,
    query_mask,
    feature_map=feature_map,
    root=root,
    key_mask=key_mask,
    options=AttendOptions(
      is_causal=is_causal,
      return_state=return_state,
      chunk_size=chunk_size,
      implementation=names_of(implementation),
      is_signed=not feature_map.info.positive,
    ),
    segment_ids=segment_ids,
    initial_state=initial_state,
  )
  return (out, state) if return_state else out


# Jitted, so that calls outside of jit are compiled once as well.
@functools.partial(jax.jit, static_argnames=("feature_map", "root", "options"))
def _spectral_attention(
  query,
  key,
  value,
  variables,
  stats,
  query_mask,
  *,
  feature_map,
  root,
  key_mask,
  options,
  segment_ids,
  initial_state,
):
  """`spectral_attention` on checked arguments."""
  check_stats_of_map(feature_map, variables, stats, key)

  def on_one_device(query, key, value, variables, rows, masks):
    stats, initial_state = rows
    query_mask, key_mask, segment_ids = masks
    if query_mask is not None:
      query = jnp.where(query_mask[:, :, None, None], query, 0)
    stats = statistics_of_keys(
      feature_map, variables, stats, key, key_mask, root
    )
    out, state = attend(
      maps_of(feature_map, root),
      feature_map.prepare(variables, stats),
      query,
      key,
      value,
      key_mask=key_mask,
      segment_ids=segment_ids,
      initial_state=initial_state,
      options=options,
    )
    longest = feature_map.component.longest
    if longest is not None and initial_state is not None:
      position = initial_state.length + jnp.arange(query.shape[1])
      reached = (position < longest)[None, :, None, None]
      out = jnp.where(reached, out, jnp.nan)
    if query_mask is not None:
      out = jnp.where(query_mask[:, :, None, None], out, 0)
    return out, state

  return meshes.on_shards(
    on_one_device,
    query,
    key,
    value,
    by_head=variables,
    by_row=(stats, initial_state),
    by_example=(query_mask, key_mask, segment_ids),
  )


def implied_attention_weights(
  query: Array, key: Array, *, feature_map: FeatureMap, **kwargs
) -> Array:
  """The T x S weights that `spectral_attention` applies, for looking at.

  Args:
    query: ``[B, T, N, H]``.
    key: ``[B, S, N, H]``.
    feature_map: see `spectral_attention`.
    **kwargs: other arguments of `spectral_attention`.

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
  out = spectral_attention(query, key, value, feature_map=feature_map, **kwargs)
  return jnp.swapaxes(out, 1, 2)


@dataclasses.dataclass(frozen=True)
class _OneSide:
  """A feature map of one side, for unscaled inputs; hashable, so static."""

  feature_map: FeatureMap
  root: float
  side: Side

  def __call__(
    self, prepared: Prepared, x: Array, position: Array
  ) -> LogFeatures:
    """Features of one chunk ``[B, N, C, H]`` of any dtype, in float32."""
    if self.feature_map.component.info.positional:
      position = jnp.asarray(position)[None, None]
      state = prepared.state._replace(position=position)
      prepared = prepared._replace(state=state)
    x = x.astype(jnp.float32) * self.root
    return self.feature_map.prepared_features(
      prepared, x, side=self.side, for_attention=True
    )


def maps_of(feature_map: FeatureMap, root: float) -> Maps:
  """Both sides of a feature map."""
  return Maps(
    _OneSide(feature_map, root, "query"), _OneSide(feature_map, root, "key")
  )


def statistics_of_keys(
  feature_map, variables, stats, key, key_mask, root
) -> PyTree:
  """`stats`, or where the map needs some, those of the visible keys.

  They stand in for queries, too: statistics over all queries would tell each of
  the others, of those to come in a decoder's cross-attention.
  """
  return statistics_of(
    feature_map, variables, stats, key, key, key_mask, key_mask, root
  )


def statistics_of(
  feature_map, variables, stats, query, key, key_mask, query_mask, root
) -> PyTree:
  """`stats`, or where the map needs some, those of the visible positions.

  For callers who know that all queries are seen together. Grouped queries count
  with their key. Arguments are those of `spectral_attention`; `root` is the
  factor on each side.
  """
  if stats is not None or not feature_map.info.needs_stats:
    return stats
  if query_mask is None and query.shape[1] == key.shape[1]:
    query_mask = key_mask
  query, query_mask = queries_by_key_head(query, query_mask, key.shape[2])
  return feature_map.calibrate(
    variables,
    query.astype(jnp.float32) * root,
    key.astype(jnp.float32) * root,
    key_mask=key_mask,
    query_mask=query_mask,
  )
