"""Spectral attention: a feature map, and linear attention on it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp

from spectraformer_jax import checks, meshes
from spectraformer_jax.feature_maps import FeatureMap, Prepared
from spectraformer_jax.feature_parts import as_variables, check_stats
from spectraformer_jax.heads import queries_by_key_head
from spectraformer_jax.linear_attention.api import (
  AttendOptions,
  attend,
  names_of,
  start,
)
from spectraformer_jax.linear_attention.empty import attend_empty
from spectraformer_jax.linear_attention.state import Maps, State, with_rest
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
  _check_stats(feature_map, variables, stats, key)

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


def init_state(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  *,
  batch_size: int,
  num_heads: int,
  head_dim: int,
  value_dim: int | None = None,
  stats: PyTree = None,
) -> State:
  """The state before the first token, for `decode_step`.

  Args:
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: its variables.
    batch_size: B.
    num_heads: N of keys and values.
    head_dim: H.
    value_dim: V; None is H.
    stats: data-dependent parameters, if the component needs them.

  Returns:
    A `State` of float32 zeros; its size does not grow as tokens come.

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
  key = jax.ShapeDtypeStruct((batch_size, 1, num_heads, head_dim), jnp.float32)
  state = start(
    maps_of(feature_map, 1.0),
    feature_map.prepare(variables, stats),
    key,
    value_dim,
    is_signed=not feature_map.info.positive,
  )
  return with_rest(state)


def decode_step(
  state: State,
  query: Array,
  key: Array,
  value: Array,
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | Array | None = None,
) -> tuple[Array, State]:
  """One more token: O(M V), whatever came before.

  Args:
    state: from `init_state`, `decode_step`, or ``spectral_attention(...,
      is_causal=True, return_state=True)`` on the prompt.
    query: ``[B, 1, N, H]``.
    key: ``[B, 1, N, H]``.
    value: ``[B, 1, N, V]``.
    feature_map: see `spectral_attention`.
    variables: the same as for the tokens before.
    stats: the same as for the tokens before.
    scale: see `spectral_attention`.

  Returns:
    ``[B, 1, N, V]`` in value's dtype, and the state with the token in it.

  Raises:
    ValueError: more than one token, shapes that do not agree, or a token
      beyond the longest sequence of its component (known only at run time, its
      output is NaN).

  Example: see `init_state`.
  """
  query, key, value = checks.as_floats(query=query, key=key, value=value)
  checks.check_attention_inputs(query, key, value)
  if query.shape[1] != 1 or key.shape[1] != 1:
    raise ValueError(
      "decode_step takes one token, got query.shape="
      f"{query.shape}; use spectral_attention(is_causal=True, "
      "initial_state=state, return_state=True) for more."
    )
  return spectral_attention(
    query,
    key,
    value,
    feature_map=feature_map,
    variables=variables,
    stats=stats,
    scale=scale,
    is_causal=True,
    initial_state=state,
    return_state=True,
    chunk_size=1,
  )


def attend_state(
  state: State,
  query: Array,
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | Array | None = None,
) -> Array:
  """Queries that see all keys of a finished state: O(T M V).

  What a decoder's cross-attention needs: the sums over the memory are made
  once, by ``spectral_attention(..., return_state=True)``, and read each step.

  Args:
    state: sums over keys and values; it stays as it is.
    query: ``[B, T, N, H]``; N may be a multiple of the state's heads.
    feature_map: see `spectral_attention`.
    variables: the same as for the keys.
    stats: the same as for the keys; needed where the map needs some.
    scale: the same as for the keys.

  Returns:
    ``[B, T, N, V]`` in query's dtype: what `spectral_attention` without
    is_causal gives for these queries and the keys of the state.

  Raises:
    ValueError: shapes that do not agree, or statistics that are missing.

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
  (query,) = checks.as_floats(query=query)
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


def check_spectral_inputs(
  query,
  key,
  value,
  *,
  feature_map,
  variables,
  stats,
  is_causal,
  key_mask,
  query_mask,
  segment_ids=None,
  has_state=False,
) -> None:
  """ValueError unless `spectral_attention` can be given these arguments."""
  checks.check_bool("is_causal", is_causal)
  checks.check_attention_inputs(query, key, value)
  checks.check_key_mask(key_mask, key)
  checks.check_key_mask(query_mask, query, "query_mask")
  check_statistics(feature_map, stats, is_causal, segment_ids, has_state)
  feature_map.check_inputs(variables, key)
  feature_map.component.check_length(query.shape[1])


def _check_stats(feature_map, variables, stats, key) -> None:
  """ValueError unless `stats` have the form that this map gives them."""
  if not jax.tree.leaves(stats):
    return
  check_stats(stats, key)
  of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  x = jax.ShapeDtypeStruct((1, 2, *key.shape[2:]), jnp.float32)
  expected = jax.eval_shape(
    lambda variables, x: feature_map.calibrate(variables, x, x),
    jax.tree.map(of, variables),
    x,
  )
  shapes = [
    jax.tree.map(lambda leaf: leaf.shape[2:], tree)
    for tree in (stats, expected)
  ]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"stats are not those of {feature_map.info.name!r}: after batch and "
      f"heads their shapes are {shapes[0]}, not {shapes[1]}; pass what its "
      "calibrate returns."
    )


def check_statistics(
  feature_map, stats, is_causal, segment_ids, has_state
) -> None:
  """ValueError where features would depend on what a query must not see."""
  component = feature_map.component
  name = component.info.name
  if is_causal and not component.info.causal_safe:
    raise ValueError(
      f"component {name!r} cannot be causal: its features depend on other "
      "positions."
    )
  if segment_ids is not None and component.info.positional:
    raise ValueError(
      f"component {name!r} counts positions of the whole row, so it cannot be "
      "combined with segment_ids."
    )
  if stats is not None or not feature_map.info.needs_stats:
    return
  leak = None
  if is_causal:
    leak = "is_causal=True", "leak the future"
  elif segment_ids is not None:
    leak = "segment_ids", "mix packed rows"
  elif has_state:
    leak = "a state", "differ from those of its other calls"
  if leak and component.needs_stats:
    raise ValueError(
      f"{leak[0]} with component {name!r} would compute statistics from the "
      f"whole sequence and {leak[1]}: build it with statistics='ema', "
      "'learned' or 'constant', or pass stats."
    )
  if leak:
    raise ValueError(
      f"{leak[0]} with weight matrix {feature_map.weight_matrix.info.name!r} "
      f"would take its context from the whole sequence and {leak[1]}: build it "
      "with context='learned', or pass stats."
    )
