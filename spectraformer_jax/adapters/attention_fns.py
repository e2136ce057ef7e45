"""Spectral attention with the signatures of other attention functions.

Both adapters take masks over query and key positions. Linear attention can
honour a mask only if one pass over the keys, in some order, can follow it: see
`mask_forms`. Any other mask is refused (see `as_attention_fn`).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from spectraformer_jax.adapters.forms import attend
from spectraformer_jax.adapters.record import Adapter, exact_keys_for
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import Window
from spectraformer_jax.typing import FeatureVariables, PyTree


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AttentionFn(Adapter):
  """What `as_attention_fn` returns.

  Attributes:
    is_causal: applies the causal triangle besides the mask; see
      `as_attention_fn`.
  """

  is_causal: bool = False

  def __call__(
    self,
    query: Float[Array, "*batch T NG H"],
    key: Float[Array, "*batch S N H"],
    value: Float[Array, "*batch S N V"],
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
  ) -> Float[Array, "*batch T NG V"]:
    """Attends, with the arguments that Flax passes to its attention_fn."""
    # `precision` has no effect: products whose precision matters are always in
    # float32 at the highest precision.
    del broadcast_dropout, dropout_rng, precision
    if dropout_rate and not deterministic:
      raise ValueError(
        f"dropout_rate={dropout_rate} of attention weights cannot be honoured: "
        "they do not exist. Set it to 0 and drop the layer's output instead."
      )
    if module is not None:
      raise ValueError(
        "sow_weights=True cannot be honoured: use implied_attention_weights."
      )
    query, key, value = _arrays(query, key, value)
    if dtype is not None:
      query, key, value = (x.astype(dtype) for x in (query, key, value))
    has_triangle = is_causal or self.is_causal
    if has_triangle:
      self.check_causal()
    masks = [x for x in (mask, bias) if x is not None]
    if _mask_rows_decide(masks, query.shape[-3], key.shape[-3], is_causal):
      has_triangle = False
    return attend(self, query, key, value, mask, bias, is_causal=has_triangle)


def _mask_rows_decide(
  masks: list[ArrayLike], length: int, num_keys: int, is_causal: bool
) -> bool:
  """Whether the rows of masks, not a triangle, say which keys queries see.

  They do with a cache of keys: a triangle would place the first query at the
  first key of the cache, but queries stand at later keys.
  """
  if length == num_keys or length == 1:
    return length != num_keys and bool(masks)
  rows = [np.shape(x)[-2] for x in masks if np.ndim(x) > 1]
  return length in rows and not is_causal


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DotProductAttention(Adapter):
  """What `as_dot_product_attention` returns."""

  def __call__(
    self,
    query: Float[Array, "*batch T NG H"],
    key: Float[Array, "*batch S N H"],
    value: Float[Array, "*batch S N V"],
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " B"] | None = None,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
  ) -> Float[Array, "*batch T NG V"]:
    """Attends, with the arguments of `jax.nn.dot_product_attention`."""
    if is_causal:
      self.check_causal()
    if local_window_size is not None or return_residual:
      raise ValueError(
        f"local_window_size ({local_window_size}) and return_residual "
        f"({return_residual}) cannot be honoured by random-feature attention: "
        "it sums over all keys, and takes no softmax."
      )
    return attend(
      self,
      *_arrays(query, key, value),
      mask,
      bias,
      must_be_bool=True,
      is_causal=is_causal,
      query_lengths=query_seq_lengths,
      key_lengths=key_value_seq_lengths,
      scale=scale,
      implementation=implementation,
    )


def as_attention_fn(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  *,
  stats: PyTree = None,
  is_causal: bool = False,
  window: Window = None,
  num_sinks: int = 0,
  num_heavy: int = 0,
) -> AttentionFn:
  """Makes an `attention_fn` for Flax's own attention modules, Linen and NNX.

  It serves `flax.linen.MultiHeadDotProductAttention` and
  `flax.nnx.MultiHeadAttention`, with masks from `make_attention_mask`,
  `make_causal_mask` and `combine_masks`, and their decode mode (which keeps all
  keys; `decode_step` keeps a state of constant size instead).

  It honours masks of real queries and real keys, the causal triangle, packed
  rows (``make_attention_mask(ids, ids, jnp.equal)``), and their combinations,
  also over the keys of a cache: all masks whose queries form groups, so that
  the sets of keys that queries see are nested within a group and disjoint
  between groups. A `bias` of 0 and -inf (or the least float) counts as a mask,
  too. Data-dependent components take masks of real queries and real keys only,
  unless `stats` is given; `cosformer` takes no packed rows. A window goes with
  masks of real queries and real keys, the causal triangle and packed rows, not
  with a cache; heavy keys go with masks of real queries and real keys only.

  It refuses any other mask or bias, dropout of attention weights, and
  `sow_weights`. A traced mask is not known before the program runs: where it
  cannot be honoured, outputs and gradients of the examples concerned are NaN,
  and ``jax_debug_nans`` turns the NaN into an error. Queries that see no key
  give zeros (softmax gives them the mean of all values).

  Args:
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N)``, N the
      number of key heads, or 1 for the same features in all heads. They are
      part of the returned record. To learn them, make the record inside the
      function that is differentiated.
    stats: data-dependent parameters; see `spectral_attention`.
    is_causal: query i sees keys 0..i. Set it if the mask is causal: finding the
      triangle in a traced mask doubles the cost. If T != S, as with a cache,
      the rows of a mask say which keys a query sees instead.
    window: keys near a query that are exact; see `spectral_attention`.
    num_sinks: number of first keys that are exact.
    num_heavy: number of keys that are exact since they are likely to get most
      attention.

  Returns:
    A frozen record that compares and hashes by its fields and can be pickled.
    It is a function of query ``[..., T, N G, H]``, key ``[..., S, N, H]``,
    value ``[..., S, N, V]`` and the keyword arguments that Flax's modules pass,
    and returns ``[..., T, N G, V]``.

  Raises:
    ValueError: `is_causal` with statistics of the whole sequence or with heavy
      keys; exact keys that the map cannot have; when called, an argument that
      cannot be honoured.

  Example:
    >>> import flax.linen, jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("oprf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8, num_heads=2)
    >>> layer = flax.linen.MultiHeadDotProductAttention(
    ...   num_heads=2, attention_fn=as_attention_fn(fm, v))
    >>> x = jnp.ones((1, 5, 16))
    >>> mask = flax.linen.make_attention_mask(x[..., 0], x[..., 0])
    >>> layer.init_with_output(jax.random.key(1), x, mask=mask)[0].shape
    (1, 5, 16)
  """
  exact = exact_keys_for(feature_map, window, num_sinks, num_heavy)
  attention = AttentionFn(feature_map, variables, stats, exact, is_causal)
  if is_causal:
    attention.check_causal()
  return attention


def as_dot_product_attention(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  *,
  stats: PyTree = None,
  window: Window = None,
  num_sinks: int = 0,
  num_heavy: int = 0,
) -> DotProductAttention:
  """Makes a function with the signature of `jax.nn.dot_product_attention`.

  It honours `mask` (bool, broadcast against ``[B, N, T, S]``) and `bias` in the
  cases that `as_attention_fn` lists; `scale`; `is_causal` (query i sees keys
  0..i, also if T != S); `query_seq_lengths` and `key_value_seq_lengths`;
  grouped queries; and arrays without batch axis. It refuses
  `local_window_size` (which hides keys, unlike `window`), `return_residual` and
  implementation="cudnn".

  Args:
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N)``, N the
      number of key heads, or 1 for the same features in all heads.
    stats: data-dependent parameters; see `spectral_attention`.
    window: see `as_attention_fn`.
    num_sinks: see `as_attention_fn`.
    num_heavy: see `as_attention_fn`.

  Returns:
    A frozen record, like that of `as_attention_fn`.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8)
    >>> attention = as_dot_product_attention(fm, v)
    >>> x = jnp.ones((1, 5, 2, 8))
    >>> attention(x, x, x, is_causal=True).shape
    (1, 5, 2, 8)
  """
  exact = exact_keys_for(feature_map, window, num_sinks, num_heavy)
  return DotProductAttention(feature_map, variables, stats, exact)


def _arrays(
  query: Array, key: Array, value: Array
) -> tuple[Array, Array, Array]:
  """Converts to arrays; raises ValueError unless their axes agree."""
  query, key, value = map(jnp.asarray, (query, key, value))
  shapes = [x.shape for x in (query, key, value)]
  batches = {shape[:-3] for shape in shapes}
  if min(map(len, shapes)) < 3 or len(batches) > 1:
    raise ValueError(
      "query, key and value must be [batch..., length, heads, head_dim] of the "
      f"same batch, got query.shape={shapes[0]}, key.shape={shapes[1]}, "
      f"value.shape={shapes[2]}."
    )
  return query, key, value
