"""Spectral attention in the places where other attention functions go.

Both adapters get masks over query and key positions. Linear attention can
honour those that say which queries and which keys are real, with or without a
causal triangle; others are refused (see `as_attention_fn`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.attention import spectral_attention
from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.typing import Array, FeatureVariables, PyTree

_NOT_A_PRODUCT = (
  "mask must say which queries and which keys are real (and follow the causal "
  "triangle if is_causal=True): linear attention cannot honour another mask "
  "over query and key positions. Use is_causal=True for a causal mask, and "
  "spectral_attention(segment_ids=...) for packed rows."
)


def as_attention_fn(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  *,
  stats: PyTree = None,
  is_causal: bool = False,
) -> Callable[..., Array]:
  """`attention_fn` for Flax's own attention modules, Linen and NNX.

  For `flax.linen.MultiHeadDotProductAttention` and
  `flax.nnx.MultiHeadAttention`, with masks as `make_attention_mask`,
  `make_causal_mask` and `combine_masks` make them, and their decode mode (which
  keeps all keys; `decode_step` keeps a state of constant size instead).

  What cannot be honoured is an error: a bias, dropout of attention weights,
  `sow_weights`, and masks that are not (real queries) x (real keys), under the
  causal triangle if `is_causal`. A mask that is traced cannot be looked at
  before the program runs; examples whose mask is not of that form then give
  NaN. Queries that see no key give zeros (softmax gives them the mean of all
  values).

  Args:
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N or 1)``.
      They are constants of the returned function: learnable ones are not
      trained (`sf.nn.SpectralSelfAttention` trains them).
    stats: data-dependent parameters; see `spectral_attention`.
    is_causal: query i sees keys 0..i, whatever the mask. Must be True where the
      mask is causal.

  Returns:
    A function of query ``[..., T, N, H]``, key ``[..., S, N, H]``, value
    ``[..., S, N, V]`` and the keyword arguments those modules pass; returns
    ``[..., T, N, V]``.

  Example:
    >>> import flax.linen, spectraformer_jax as sf
    >>> fm = sf.feature_map("oprf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8, num_heads=2)
    >>> layer = flax.linen.MultiHeadDotProductAttention(
    ...   num_heads=2, attention_fn=as_attention_fn(fm, v))
    >>> x = jnp.ones((1, 5, 16))
    >>> mask = flax.linen.make_attention_mask(x[..., 0], x[..., 0])
    >>> layer.init_with_output(jax.random.key(1), x, mask=mask)[0].shape
    (1, 5, 16)
  """
  always_causal = is_causal

  def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
  ) -> Array:
    """Attention in the form that Flax calls it."""
    # `precision`: products that matter are float32 at the highest in any case.
    del broadcast_dropout, dropout_rng, precision
    _refuse("bias", bias, None, "there are no scores to add it to")
    if dropout_rate and not deterministic:
      raise ValueError(
        f"dropout_rate={dropout_rate} of attention weights cannot be honoured: "
        "they do not exist. Set it to 0 and drop the layer's output instead."
      )
    if module is not None:
      raise ValueError(
        "sow_weights=True cannot be honoured: use implied_attention_weights."
      )
    if dtype is not None:
      query, key, value = (x.astype(dtype) for x in (query, key, value))
    return _attend(
      query,
      key,
      value,
      mask,
      feature_map=feature_map,
      variables=variables,
      stats=stats,
      is_causal=is_causal or always_causal,
    )

  return attention_fn


def as_dot_product_attention(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  *,
  stats: PyTree = None,
) -> Callable[..., Array]:
  """A function with the signature of `jax.nn.dot_product_attention`.

  Honoured: `mask` (bool ``[B, N, T, S]``, see `as_attention_fn` for which),
  `scale`, `is_causal`, `query_seq_lengths`, `key_value_seq_lengths`, grouped
  queries, and arrays without batch axis. `bias`, `local_window_size`,
  `return_residual` and implementation="cudnn" are errors.

  Args:
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N or 1)``.
    stats: data-dependent parameters; see `spectral_attention`.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8)
    >>> attention = as_dot_product_attention(fm, v)
    >>> x = jnp.ones((1, 5, 2, 8))
    >>> attention(x, x, x, is_causal=True).shape
    (1, 5, 2, 8)
  """

  def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
  ) -> Array:
    """Attention in the form of `jax.nn.dot_product_attention`."""
    _refuse("bias", bias, None, "there are no scores to add it to")
    window = local_window_size
    _refuse("local_window_size", window, None, "the sum is over all keys")
    _refuse("return_residual", return_residual, False, "no softmax is taken")
    return _attend(
      query,
      key,
      value,
      mask,
      feature_map=feature_map,
      variables=variables,
      stats=stats,
      scale=scale,
      is_causal=is_causal,
      query_lengths=query_seq_lengths,
      key_lengths=key_value_seq_lengths,
      implementation=implementation,
    )

  return dot_product_attention


def _refuse(name: str, value: Any, default: Any, reason: str) -> None:
  """ValueError unless an argument has its default."""
  if value is not default:
    shown = f"of shape {value.shape}" if hasattr(value, "shape") else value
    raise ValueError(
      f"{name} ({shown}) cannot be honoured by random-feature attention: "
      f"{reason}."
    )


def _attend(
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  *,
  is_causal: bool,
  query_lengths: Array | None = None,
  key_lengths: Array | None = None,
  **kwargs,
) -> Array:
  """`spectral_attention` with any batch axes, and a mask over both."""
  batch, length = query.shape[:-3], query.shape[-3]
  if mask is not None:
    mask = jnp.asarray(mask)
    mask = mask.reshape(1, *mask.shape) if mask.ndim == 3 else mask
    mask = mask.reshape(-1, *mask.shape[-3:])
  query, key, value = (
    x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)
  )
  # One query and many keys: a step of decoding, whose mask says which.
  if length == 1 and key.shape[1] > 1 and mask is not None:
    is_causal = False
  query_mask, key_mask, honoured = _split_mask(mask, query, key, is_causal)
  out = spectral_attention(
    query,
    key,
    value,
    query_mask=_and_lengths(query_mask, query_lengths, query),
    key_mask=_and_lengths(key_mask, key_lengths, key),
    is_causal=is_causal,
    **kwargs,
  )
  if isinstance(honoured, jax.core.Tracer):
    out = jnp.where(honoured[:, None, None, None], out, jnp.nan)
  elif not honoured.all():
    raise ValueError(f"{_NOT_A_PRODUCT} Got mask.shape={mask.shape}.")
  return out.reshape(*batch, *out.shape[1:])


def _and_lengths(
  mask: Array | None, lengths: Array | None, x: Array
) -> Array | None:
  """A ``[B, T]`` mask that also hides positions from `lengths` ``[B]`` on."""
  if lengths is None:
    return mask
  real = checks.positions_before(jnp.asarray(lengths), x.shape[1])
  return real if mask is None else mask & real


def _split_mask(
  mask: Array | None, query: Array, key: Array, is_causal: bool
) -> tuple[Array | None, Array | None, Array]:
  """A mask as real queries and real keys.

  Args:
    mask: ``[B or 1, N or 1, T or 1, S or 1]``, non-zero where a query may see a
      key, or None.
    query: ``[B, T, N, H]``.
    key: ``[B, S, N, H]``.
    is_causal: within the causal triangle.

  Returns:
    Bool ``[B, T]`` and ``[B, S]``, None for all, and whether they say what the
    mask says, bool ``[B]``.
  """
  batch, length = query.shape[:2]
  if mask is None:
    return None, None, jnp.ones(batch, bool)
  expected = (batch, query.shape[2], length, key.shape[1])
  if any(m not in (1, e) for m, e in zip(mask.shape, expected, strict=True)):
    raise ValueError(
      "mask must be broadcastable to [batch, heads, query length, key length] "
      f"= {list(expected)}, got mask.shape={mask.shape}."
    )
  mask = mask.astype(bool)
  mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:3], key.shape[1]))
  one = mask[:, 0]
  keys = one.any(axis=1)
  queries = None
  product = keys[:, None]
  if mask.shape[2] > 1:
    queries = one.any(axis=2)
    product = product & queries[:, :, None]
    if is_causal:
      product = jnp.tril(product)
  honoured = jnp.all(mask == product[:, None], axis=(1, 2, 3))
  return queries, keys, honoured
