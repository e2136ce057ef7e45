"""Spectral attention: a feature map, a stabiliser and linear attention."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.linear_attention.api import attend
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  LogFeatures,
  PyTree,
)


def spectral_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | None = None,
  is_causal: bool = False,
  key_mask: Array | None = None,
  query_mask: Array | None = None,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Array:
  r"""Random-feature attention, O(T): the kernel trick run backwards.

  Estimates :func:`exact_attention` for the kernel of `feature_map`: queries
  and keys are scaled once, mapped to features, and attended linearly. Features
  are stabilised without approximation: each feature is shifted by its largest
  log-magnitude over the visible keys, which the queries take back, and each
  query by its largest one, which cancels.

  Args:
    query: ``[B, T, N, H]``, any float dtype.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N or 1)``.
    stats: data-dependent parameters; None computes them from `query` and `key`
      (over the visible positions, each example for itself) where the component
      needs them and attention is not causal.
    scale: of ``query . key``; None means ``1 / sqrt(H)``.
    is_causal: query i sees keys 0..i; needs T == S.
    key_mask: ``[B, S]`` bool, True where a key may be seen; acts on features.
    query_mask: ``[B, T]`` bool: queries that count in the statistics; others
      give zeros. None: all give outputs, and where T == S statistics take
      `key_mask`, as self-attention needs.
    chunk_size: see `linear_attention`.
    implementation: see `linear_attention`.

  Returns:
    ``[B, T, N, V]`` in value's dtype. A query that sees no key gives zeros.

  Raises:
    ValueError: shapes that do not agree, a mask over query and key positions,
      or causal attention with statistics of the whole sequence.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("oprf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8, num_heads=2)
    >>> x = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
    >>> spectral_attention(x, x, x, feature_map=fm, variables=v).shape
    (1, 5, 2, 8)
  """
  checks.check_attention_inputs(query, key, value, is_causal=is_causal)
  checks.check_key_mask(key_mask, key)
  checks.check_key_mask(query_mask, query, "query_mask")
  _check_causal(feature_map, stats, is_causal)
  root = checks.split_scale(scale, query.shape[-1])
  x, y = (a.astype(jnp.float32) * root for a in (query, key))
  if query_mask is not None:
    x = jnp.where(query_mask[:, :, None, None], x, 0.0)
  if key_mask is not None:
    y = jnp.where(key_mask[:, :, None, None], y, 0.0)
  if stats is None:
    if query_mask is None and x.shape[1] == y.shape[1]:
      query_mask_of_stats = key_mask
    else:
      query_mask_of_stats = query_mask
    stats = feature_map.calibrate(
      variables, x, y, key_mask=key_mask, query_mask=query_mask_of_stats
    )
  phi, psi = stabilise(
    feature_map.log_features(variables, x, side="query", stats=stats),
    feature_map.log_features(variables, y, side="key", stats=stats),
    key_mask,
  )
  out = attend(
    phi,
    psi,
    value,
    is_causal=is_causal,
    key_mask=key_mask,
    chunk_size=chunk_size,
    implementation=implementation,
    is_signed=not feature_map.info.positive,
  )
  if query_mask is not None:
    out = jnp.where(query_mask[:, :, None, None], out, 0)
  return out


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
  batch, length, heads = key.shape[:3]
  eye = jnp.eye(length, dtype=jnp.float32)[None, :, None, :]
  value = jnp.broadcast_to(eye, (batch, length, heads, length))
  out = spectral_attention(query, key, value, feature_map=feature_map, **kwargs)
  return jnp.swapaxes(out, 1, 2)


def stabilise(
  query: LogFeatures, key: LogFeatures, key_mask: Array | None
) -> tuple[Array, Array]:
  """Features of bounded size whose attention equals the naive one, exactly.

  Each feature is shifted by its maximum over the visible keys of its example
  and head, compensated on the query; then each query by its own maximum. Both
  cancel in the ratio, so no gradient flows through them. For a positive map
  that is not causal every normalizer is at least 1.

  Args:
    query: log-features ``[B, T, N, F]``.
    key: log-features ``[B, S, N, F]``.
    key_mask: ``[B, S]`` bool or None.

  Returns:
    query features ``[B, T, N, F]`` and key features ``[B, S, N, F]``, float32;
    hidden keys are 0.
  """
  key_log = key.log_magnitude
  if key_mask is not None:
    key_log = jnp.where(key_mask[:, :, None, None], key_log, -jnp.inf)
  shift = jnp.max(key_log, axis=1, keepdims=True)
  shift = jax.lax.stop_gradient(jnp.where(jnp.isfinite(shift), shift, 0.0))
  query_log = query.log_magnitude + shift
  top = jax.lax.stop_gradient(jnp.max(query_log, axis=-1, keepdims=True))
  phi, psi = jnp.exp(query_log - top), jnp.exp(key_log - shift)
  if query.factor is not None:
    phi, psi = query.factor * phi, key.factor * psi
  return phi, psi


def _check_causal(feature_map, stats, is_causal) -> None:
  """ValueError for a causal call whose statistics would see the future."""
  component = feature_map.component
  if not is_causal:
    return
  if not component.info.causal_safe:
    raise ValueError(
      f"component {component.info.name!r} cannot be causal: its features "
      "depend on other positions."
    )
  if component.needs_stats and stats is None:
    raise ValueError(
      f"is_causal=True with component {component.info.name!r} would compute "
      "statistics from the whole sequence and leak the future: build it with "
      "statistics='ema', 'learned' or 'constant', or pass stats."
    )
