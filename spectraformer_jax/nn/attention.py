"""Multi-head self-attention with a feature map, exact, or a baseline."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.attention import spectral_attention, statistics_of
from spectraformer_jax.baselines import BASELINES, check_options
from spectraformer_jax.decoding import init_state
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.kernels import KERNELS, exact_attention
from spectraformer_jax.nn.feature_variables import (
  feature_variables,
  running_stats,
)
from spectraformer_jax.nn.inputs import check_flags, check_rows, without_padding
from spectraformer_jax.nn.positions import next_positions, rotate
from spectraformer_jax.nn.projections import projection
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array

ATTENTIONS = ("spectral", *KERNELS, *BASELINES)


class SpectralSelfAttention(nn.Module):
  """Multi-head self-attention, linear in the length.

  Attributes:
    num_heads: N of the queries.
    head_dim: H.
    feature_map: for attention="spectral"; see `sf.feature_map`.
    attention: "spectral", or a baseline through the same module: an exact
      kernel, "softmax" or "gaussian", or one of `baselines.BASELINES`.
    attention_kwargs: options of a baseline, as of `baselines`.
    max_len: longest sequence, for baselines with parameters for each position;
      None takes the length at initialisation.
    is_causal: position i sees positions 0..i.
    rotary: queries and keys are turned by their positions before the feature
      map or kernel; see `rotate`.
    share_projection: one weight matrix for all heads instead of one each.
    num_key_value_heads: heads of keys and values, each seen by equally many
      query heads (grouped-query attention); None is `num_heads`.
    dtype: of the dense layers; None takes that of the input.
    param_dtype: of the dense layers' parameters; a feature map's are float32.

  Example:
    >>> import jax, spectraformer_jax as sf
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
  share_projection: bool = False
  num_key_value_heads: int | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32

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
      mask: ``[B, T]`` bool, True at real positions; None for all. What padding
        holds, NaN included, reaches neither outputs at real positions nor any
        gradient.
      segment_ids: ints ``[B, T]`` of packed rows: a position sees those of its
        own segment, and rotary positions start again in each.
      decode: the positions follow those of earlier calls, whose state (and
        number, for rotary positions) is in the collection "cache"; see
        `LanguageModel`.
      deterministic: False in training: updates running statistics.

    Returns:
      ``[B, T, D]``.

    Raises:
      ValueError: unknown `attention` or option, no `feature_map` where one is
        needed, `is_causal` where that is not possible, `rotary` with an odd
        `head_dim`, heads that do not divide, a `max_len` beyond that of the
        component, `segment_ids` of a baseline or with `decode`, `decode` with
        other attention than causal spectral or with a mask where features
        depend on positions.
    """
    check_flags(decode=decode, deterministic=deterministic)
    mask, segment_ids = check_rows(x, mask, segment_ids)
    self._check(mask, segment_ids, decode)
    x = without_padding(x, mask)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    key_heads = self.num_key_value_heads or self.num_heads
    query, key, value = (
      projection((heads, self.head_dim), name=name, **dtypes)(x)
      for name, heads in (
        ("query", self.num_heads),
        ("key", key_heads),
        ("value", key_heads),
      )
    )
    if self.rotary:
      index = next_positions(self, x, mask, segment_ids, decode)
      query, key = rotate(query, index), rotate(key, index)
    if self.attention == "spectral":
      out = self._spectral(
        query, key, value, mask, segment_ids, decode, deterministic
      )
    elif self.attention in BASELINES:
      out = self._baseline(query, key, value, mask)
    else:
      out = exact_attention(
        query,
        key,
        value,
        kernel=self.attention,
        is_causal=self.is_causal,
        key_mask=mask,
        segment_ids=segment_ids,
      )
    return projection(x.shape[-1], axis=(-2, -1), name="out", **dtypes)(out)

  def _spectral(
    self, query, key, value, mask, segment_ids, decode, deterministic
  ):
    """Attention of the feature map, after the keys of earlier calls."""
    heads = {"num_heads": key.shape[2], "head_dim": self.head_dim}
    variables = feature_variables(
      self,
      self.feature_map,
      head_dim=self.head_dim,
      num_heads=1 if self.share_projection else key.shape[2],
    )
    stats = running_stats(
      self,
      self.feature_map,
      variables,
      query,
      key,
      query_mask=mask,
      key_mask=mask,
      deterministic=deterministic,
    )
    if stats is None and not self.is_causal and segment_ids is None:
      # Every position sees all, so queries count as well.
      root = float(self.head_dim) ** -0.25
      stats = statistics_of(
        self.feature_map, variables, None, query, key, mask, mask, root
      )
    kwargs = {
      "feature_map": self.feature_map,
      "variables": variables,
      "stats": stats,
    }
    state = None
    if decode:
      state = self.variable(
        "cache",
        "state",
        lambda: init_state(batch_size=query.shape[0], **heads, **kwargs),
      )
    out = spectral_attention(
      query,
      key,
      value,
      is_causal=self.is_causal,
      key_mask=mask,
      segment_ids=segment_ids,
      initial_state=state and state.value,
      return_state=decode,
      **kwargs,
    )
    if not decode:
      return out
    out, after = out
    if not self.is_initializing():  # `init` makes an empty cache
      state.value = after
    return out

  def _baseline(self, query, key, value, mask):
    """Attention of one of `BASELINES`, whose parameters are "baseline"."""
    baseline = BASELINES[self.attention]
    kwargs = dict(self.attention_kwargs or {})
    if baseline.init_params is not None:
      sizes = {
        "num_heads": key.shape[2],
        "max_len": self.max_len or key.shape[1],
      }
      kwargs = self.param(
        "baseline", lambda rng: baseline.init_params(rng, **sizes, **kwargs)
      )
    if baseline.can_be_causal:
      kwargs["is_causal"] = self.is_causal
    return baseline.attend(query, key, value, key_mask=mask, **kwargs)

  def _check(self, mask, segment_ids, decode):
    """ValueError for options that do not go together."""
    check_attention(self)
    check_options(
      self.attention, self.attention_kwargs or {}, is_causal=self.is_causal
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


def check_attention(module: nn.Module) -> None:
  """ValueError unless attention, feature map and heads go together.

  Args:
    module: with the attributes of `SpectralSelfAttention` of these names.
  """
  attention, feature_map = module.attention, module.feature_map
  if attention not in ATTENTIONS:
    raise ValueError(
      f"Unknown attention {attention!r}.{nearest(attention, ATTENTIONS)}"
    )
  if (attention == "spectral") != (feature_map is not None):
    raise ValueError(
      f"attention={attention!r} with feature_map="
      f"{feature_map and feature_map.info.name!r}: 'spectral' "
      "needs a feature map, the exact kernels take none, nor do baselines."
    )
  heads = module.num_key_value_heads
  if heads is not None and (heads < 1 or module.num_heads % heads):
    raise ValueError(
      f"num_key_value_heads={heads} must divide num_heads={module.num_heads}."
    )
