"""Multi-head self-attention: spectral, exact or a baseline."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectraformer_jax.attention import spectral_attention
from spectraformer_jax.baselines import BASELINES, check_options
from spectraformer_jax.decoding import init_state
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.vmap_heads import queries_by_key_head
from spectraformer_jax.hybrid_attention.state import HybridState
from spectraformer_jax.kernels import EXACT_KERNELS, exact_attention
from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.nn import exact_keys
from spectraformer_jax.nn.attention_base import MultiHeadAttention
from spectraformer_jax.nn.config import ExactKeyFields
from spectraformer_jax.nn.inputs import check_flags, check_rows, without_padding
from spectraformer_jax.nn.positions import next_positions, rotate
from spectraformer_jax.typing import Array


class SpectralSelfAttention(MultiHeadAttention, ExactKeyFields):
  """Multi-head self-attention, linear in the length.

  Attributes:
    num_heads: number of query heads.
    head_dim: H, the width of one head.
    feature_map: for attention="spectral"; see `sf.feature_map`.
    attention: "spectral", an exact kernel (a name of `kernels.EXACT_KERNELS`,
      "softmax" or another) or a baseline (a name of `baselines.BASELINES`).
    attention_kwargs: options of a baseline.
    max_len: longest sequence, for baselines with parameters for each position;
      None takes the length at initialisation.
    is_causal: position i sees positions 0..i.
    rotary: rotates queries and keys by their positions before the feature map
      or kernel; see `rotate`.
    window, num_sinks, num_heavy, share_projection, num_key_value_heads: see
      `EncoderConfig`.
    dtype: of the dense layers; None takes that of the input.
    param_dtype: of the dense layers' parameters; a feature map's are float32.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> layer = sf.nn.SpectralSelfAttention(
    ...   num_heads=2, head_dim=8, feature_map=sf.feature_map(
    ...     "oprf", "orf", num_features=16))
    >>> x = jnp.ones((1, 5, 16))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> sorted(variables)
    ['params', 'random_features']
    >>> layer.apply(variables, x).shape
    (1, 5, 16)
  """

  num_heads: int
  head_dim: int
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  max_len: int | None = None
  is_causal: bool = False
  rotary: bool = False

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None = None,
    *,
    segment_ids: Array | None = None,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Attends.

    Args:
      x: ``[B, T, D]``.
      mask: ``[B, T]`` bool, True at real positions; None for all. The content
        of padding, NaN included, reaches neither outputs at real positions nor
        any gradient.
      segment_ids: ints ``[B, T]`` of packed rows: a position sees positions of
        its own segment only, and rotary positions start at 0 in each.
      decode: x continues the sequence of earlier calls. Their state (and their
        number of positions, if `rotary`) is in the collection "cache"; see
        `LanguageModel`. With a window, the state keeps the window's keys;
        positions that `mask` hides are left out of the state.
      deterministic: False in training: updates running statistics.

    Returns:
      ``[B, T, D]``.

    Raises:
      ValueError: unknown `attention` or option; no `feature_map` with
        "spectral", or one with another attention; `is_causal` or `segment_ids`
        with an attention that does not take it; exact keys that the attention
        or its component cannot have; `rotary` with an odd
        `head_dim`; `num_key_value_heads` that does not divide `num_heads`; a
        `max_len` above that of the component; `decode` with `segment_ids`,
        without causal spectral attention, or with a mask and a component that
        counts positions.
    """
    check_flags(decode=decode, deterministic=deterministic)
    mask, segment_ids = check_rows(x, mask, segment_ids)
    self._check(mask, segment_ids, decode)
    x = without_padding(x, mask)
    names = ("query", "key", "value")
    query, key, value = (self._project(name, x) for name in names)
    if self.rotary:
      index = next_positions(self, x, mask, segment_ids, decode)
      query, key = rotate(query, index), rotate(key, index)
    if decode:
      out = self._decode(query, key, value, mask, deterministic)
    else:
      attend = self._attention_function(
        query, key, mask, segment_ids, deterministic
      )
      out = attend(query, key, value, key_mask=mask)
    return self._dense(x.shape[-1], axis=(-2, -1), name="out")(out)

  def _attention_function(
    self,
    query: Array,
    key: Array,
    mask: Array | None,
    segment_ids: Array | None,
    deterministic: bool,
  ) -> Callable[..., Array]:
    """Returns attention as a function of query, key, value and key_mask."""
    if self.attention in BASELINES:
      return self._baseline(key)
    visibility = {"is_causal": self.is_causal, "segment_ids": segment_ids}
    if self.attention in EXACT_KERNELS:
      return functools.partial(
        exact_attention, kernel=self.attention, **visibility
      )
    sees_all = not self.is_causal and segment_ids is None
    map_arguments = self._map_arguments(
      query, key, mask, sees_all, deterministic
    )
    return functools.partial(
      spectral_attention,
      **map_arguments,
      **visibility,
      **exact_keys.options_of(self),
    )

  def _baseline(self, key: Array) -> Callable[..., Array]:
    """Returns a baseline as a function, with its parameters, if any."""
    baseline = BASELINES[self.attention]
    options: dict[str, Any] = dict(self.attention_kwargs or {})
    if init_params := baseline.init_params:
      max_len, num_heads = self.max_len or key.shape[1], key.shape[2]
      init = functools.partial(
        init_params, num_heads=num_heads, max_len=max_len, **options
      )
      options = dict(self.param("baseline", init))
    if baseline.can_be_causal:
      options["is_causal"] = self.is_causal
    return functools.partial(baseline.attend, **options)

  def _map_arguments(
    self,
    query: Array,
    key: Array,
    mask: Array | None,
    sees_all: bool,
    deterministic: bool,
  ) -> dict[str, Any]:
    """Returns the feature map, its variables and stats, as keyword arguments.

    Args:
      query: ``[B, T, N G, H]``.
      key: ``[B, T, N, H]``.
      mask: ``[B, T]`` bool, or None.
      sees_all: whether each position sees all others: only then may
        statistics include all queries.
      deterministic: False updates running statistics.
    """
    feature_map, variables = self._feature_map()
    stats = self._running_stats(
      variables, query, key, mask, mask, deterministic
    )
    if stats is None and sees_all and feature_map.info.needs_stats:
      query, query_mask = queries_by_key_head(query, mask, key.shape[2])
      stats = feature_map.calibrate(
        variables,
        query.astype(jnp.float32) * self._sqrt_scale,
        key.astype(jnp.float32) * self._sqrt_scale,
        key_mask=mask,
        query_mask=query_mask,
      )
    return {"feature_map": feature_map, "variables": variables, "stats": stats}

  def _decode(
    self,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    deterministic: bool,
  ) -> Array:
    """Attends to the keys of earlier calls and of this one, causally."""
    map_arguments = self._map_arguments(
      query, key, mask, sees_all=False, deterministic=deterministic
    )
    exact = {"window": self.window, "num_sinks": self.num_sinks}
    batch_size, _, num_heads, head_dim = key.shape
    cache = self.variable(
      "cache",
      "state",
      init_state,
      **map_arguments,
      **exact,
      batch_size=batch_size,
      num_heads=num_heads,
      head_dim=head_dim,
    )
    state = cache.value

    def attend(
      query: Array, key: Array, value: Array, **options: Any
    ) -> tuple[Array, State | HybridState]:
      return spectral_attention(
        query,
        key,
        value,
        **map_arguments,
        **exact,
        **options,
        is_causal=True,
        return_state=True,
      )

    has_ring = isinstance(state, HybridState) and state.ring_key is not None
    if mask is not None and has_ring:
      out, new_state = exact_keys.continue_rows(
        attend, state, query, key, value, mask
      )
    else:
      out, new_state = attend(
        query, key, value, key_mask=mask, initial_state=state
      )
    if not self.is_initializing():  # `init` makes an empty cache
      # Keys of a window have the dtype of the first state, so that a loop can
      # carry the state.
      as_before = lambda new, old: new.astype(old.dtype)
      cache.value = jax.tree.map(as_before, new_state, state)
    return out

  def _check(
    self, mask: Array | None, segment_ids: Array | None, decode: bool
  ) -> None:
    """Raises ValueError for options that exclude each other."""
    self._check_fields()
    check_options(
      self.attention, self.attention_kwargs or {}, is_causal=self.is_causal
    )
    exact_keys.check_options(
      exact_keys.options_of(self),
      self.attention,
      self.feature_map,
      is_causal=self.is_causal,
    )
    component = self.feature_map and self.feature_map.component
    if component and self.max_len:
      component.check_length(self.max_len)
    if segment_ids is not None and self.attention in BASELINES:
      raise ValueError(
        f"segment_ids with attention={self.attention!r}: only 'spectral' and "
        "the exact kernels take packed rows."
      )
    if not decode:
      return
    if not (component and self.is_causal):
      raise ValueError(
        f"decode=True with attention={self.attention!r}, is_causal="
        f"{self.is_causal}: only causal spectral attention has a state."
      )
    if segment_ids is not None:
      raise ValueError(
        "decode=True with segment_ids: a state is the sum of one row."
      )
    if mask is not None and component.info.positional:
      raise ValueError(
        f"component {component.info.name!r} counts positions of the whole row, "
        "so rows of different lengths cannot be decoded together."
      )
