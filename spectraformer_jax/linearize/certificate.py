"""Measures a feature map on one layer, through `sf.spectral_attention`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from spectraformer_jax import checks
from spectraformer_jax.attention import (
  implied_attention_weights,
  spectral_attention,
)
from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import (
  ExactKeys,
  Window,
  exact_keys_of,
)
from spectraformer_jax.kernels import KERNELS, exact_attention
from spectraformer_jax.linearize.problem import arrays_of
from spectraformer_jax.linearize.records import Certificate
from spectraformer_jax.registry import check_choice
from spectraformer_jax.study.approximation.errors import (
  exact_and_uniform,
  relative_error,
  zero_masked,
)
from spectraformer_jax.typing import Array, FeatureVariables, Mask

# The least positive normal number of float32: the logarithm of a weight of 0.
_TINY = 1.2e-38


class _Setting(NamedTuple):
  """The static arguments of both attentions."""

  feature_map: FeatureMap
  exact: ExactKeys
  is_causal: bool
  target: str


def certify(
  query: Float[Array, "B T NG H"],
  key: Float[Array, "B S N H"],
  value: Float[Array, "B S N V"],
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  start: FeatureVariables | None = None,
  scale: float | Float[Array, ""] | None = None,
  is_causal: bool = False,
  key_mask: Bool[Array, "B S"] | None = None,
  query_mask: Bool[Array, "B T"] | None = None,
  window: Window = None,
  num_sinks: int = 0,
  num_heavy: int = 0,
  target: str = "softmax",
) -> Certificate:
  """Measures how far `spectral_attention` is from exact attention.

  The errors are those of `spectraformer_jax.study`. For the weights, one
  sequence at a time has its T x S matrix in memory.

  Args:
    query: ``[B, T, N, H]`` of sequences on which nothing was fitted.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    feature_map: any map.
    variables: of the map.
    start: other variables to measure as well.
    scale: of ``query . key``; None means ``1 / sqrt(H)``.
    is_causal: query i sees keys 0..i.
    key_mask: ``[B, S]`` bool: keys that may be seen.
    query_mask: ``[B, T]`` bool: queries whose outputs count.
    window: keys near a query that are exact.
    num_sinks: number of first visible keys that are exact.
    num_heavy: number of heavy keys that are exact.
    target: kernel of the exact attention: "softmax" or "gaussian".

  Raises:
    ValueError: arrays do not agree or are not finite, a whole sequence is
      hidden, or `spectral_attention` cannot have these arguments.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=64)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jax.random.normal(jax.random.key(1), (1, 9, 2, 4))
    >>> found = certify(x, x, x, feature_map=fm, variables=v)
    >>> found.error.shape, found.error_all < found.uniform_error
    ((2,), True)
  """
  check_choice("target", target, KERNELS)
  arrays = arrays_of(
    AttentionArrays(query, key, value, key_mask, query_mask), needs_value=True
  )
  exact_keys = exact_keys_of(window, num_sinks, num_heavy, is_causal=is_causal)
  setting = _Setting(feature_map, exact_keys, bool(is_causal), target)
  head_dim = arrays.query.shape[-1]
  factor = jnp.float32(head_dim**-0.5 if scale is None else scale)
  exact, uniform = exact_and_uniform(
    arrays, scale=scale, is_causal=is_causal, kernel=target
  )

  def measure(variables: FeatureVariables) -> Certificate:
    options = _options(setting, variables, scale, arrays)
    out = spectral_attention(*arrays[:3], **options)
    out = zero_masked(out, arrays.query_mask)
    of_weights = _of_weights(setting, variables, factor, arrays)
    divergence, entropy, score_std = (np.asarray(x, float) for x in of_weights)
    return Certificate(
      error=_by_head(out, exact),
      error_all=relative_error(out, exact),
      uniform=_by_head(uniform, exact),
      uniform_error=relative_error(uniform, exact),
      kl=divergence,
      entropy=entropy,
      score_std=score_std,
    )

  found = measure(variables)
  return found if start is None else found._replace(start=measure(start))


def _options(
  setting: _Setting,
  variables: FeatureVariables,
  scale: float | Array | None,
  arrays: AttentionArrays,
) -> Any:
  """Returns the keyword arguments of `spectral_attention`."""
  return {
    "feature_map": setting.feature_map,
    "variables": variables,
    "scale": scale,
    "is_causal": setting.is_causal,
    "key_mask": arrays.key_mask,
    "query_mask": arrays.query_mask,
    **setting.exact._asdict(),
  }


def _by_head(out: np.ndarray, exact: np.ndarray) -> np.ndarray:
  """Returns the relative error of each head of ``[B, T, N, V]``."""
  heads = range(exact.shape[2])
  return np.array([relative_error(out[:, :, n], exact[:, :, n]) for n in heads])


@functools.partial(jax.jit, static_argnums=0)
def _of_weights(
  setting: _Setting,
  variables: FeatureVariables,
  scale: Array,
  arrays: AttentionArrays,
) -> tuple[Array, Array, Array]:
  """Returns `kl`, `entropy` and `score_std` of each head, ``[N]`` each."""

  def of_sequence(arrays: AttentionArrays) -> tuple[Array, ...]:
    arrays = jax.tree.map(lambda leaf: leaf[None], arrays)
    query, key, _, key_mask, query_mask, _ = arrays
    assert key_mask is not None and query_mask is not None  # of `arrays_of`
    query = jnp.where(query_mask[:, :, None, None], query, 0)
    key = jnp.where(key_mask[:, :, None, None], key, 0)
    visible = checks.visible_keys(query, key, setting.is_causal, key_mask, None)
    counts = query_mask[:, None] & jnp.any(visible, axis=-1)
    mean = lambda x: (
      jnp.sum(jnp.where(counts, x, 0.0), axis=(0, 2))
      / jnp.maximum(jnp.sum(counts), 1).astype(x.dtype)
    )
    a = _exact_weights(setting, query, key, key_mask, scale)
    options = _options(setting, variables, scale, arrays)
    b = implied_attention_weights(query, key, **options)
    log = lambda weights: jnp.log(jnp.maximum(weights, _TINY))
    divergence = jnp.sum(a * (log(a) - log(b)), axis=-1)
    entropy = -jnp.sum(a * log(a), axis=-1)
    return (
      mean(divergence),
      mean(entropy),
      _variance(
        _scores(query, key, scale), visible & query_mask[:, None, :, None]
      ),
    )

  of_all = jax.lax.map(of_sequence, arrays)
  divergence, entropy, variance = (jnp.mean(x, axis=0) for x in of_all)
  if not setting.feature_map.info.positive:
    divergence = jnp.full_like(divergence, jnp.nan)
  return divergence, entropy, jnp.sqrt(variance)


def _exact_weights(
  setting: _Setting, query: Array, key: Array, key_mask: Mask, scale: Array
) -> Array:
  """Returns the weights of exact attention, ``[B, N, T, S]``."""
  eye = jnp.eye(key.shape[1], dtype=jnp.float32)[None, :, None]
  out = exact_attention(
    query,
    key,
    jnp.broadcast_to(eye, (*key.shape[:3], key.shape[1])),
    kernel=setting.target,
    scale=scale,
    is_causal=setting.is_causal,
    key_mask=key_mask,
  )
  return jnp.swapaxes(out, 1, 2)


def _scores(query: Array, key: Array, scale: Array) -> Array:
  """Returns scaled products of queries and keys, ``[B, N, T, S]``."""
  key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
  products = jnp.einsum(
    "btnh,bsnh->bnts",
    query.astype(jnp.float32),
    key.astype(jnp.float32),
    precision="highest",
  )
  return scale * products


def _variance(scores: Array, visible: Array) -> Array:
  """Returns the variance of each head's visible scores, ``[N]``."""
  visible = jnp.broadcast_to(visible, scores.shape)
  mean = lambda x: jnp.mean(x, axis=(0, 2, 3), keepdims=True, where=visible)
  return mean(jnp.square(scores - mean(scores))).reshape(-1)
