"""Pre-LayerNorm Transformer encoder."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.nn.attention import SpectralSelfAttention
from spectraformer_jax.nn.dropout import Dropout
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.typing import Array


class EncoderLayer(nn.Module):
  """Attention and MLP, each behind a LayerNorm and beside a residual.

  Attributes:
    mlp_dim: hidden width of the MLP (GELU).
    dropout_rate: after attention, and twice in the MLP.
    num_heads, head_dim, feature_map, attention, attention_kwargs, max_len,
      is_causal, share_projection, dtype: see `SpectralSelfAttention`.
  """

  num_heads: int = 2
  head_dim: int = 32
  mlp_dim: int = 128
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  max_len: int | None = None
  is_causal: bool = False
  share_projection: bool = False
  dropout_rate: float = 0.1
  dtype: Any = None

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """``[B, T, D]`` and a mask ``[B, T]`` or None -> ``[B, T, D]``."""

    def drop(y):
      return Dropout(self.dropout_rate)(y, deterministic=deterministic)

    y = nn.LayerNorm(dtype=self.dtype)(x)
    attention = part_of(self, SpectralSelfAttention, name="attention")
    y = attention(y, mask, decode=decode, deterministic=deterministic)
    x = x + drop(y)
    y = nn.LayerNorm(dtype=self.dtype)(x)
    y = drop(nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype)(y)))
    y = nn.Dense(x.shape[-1], dtype=self.dtype)(y)
    return x + drop(y)


class Encoder(nn.Module):
  """A stack of `EncoderLayer` with a final LayerNorm.

  Attributes:
    num_layers: depth.
    remat: in the backward pass, compute each layer's values again instead of
      keeping them: less memory, more time, the same numbers.
    num_heads, head_dim, mlp_dim, feature_map, attention, attention_kwargs,
      max_len, is_causal, share_projection, dropout_rate, dtype: see
      `EncoderLayer`.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> encoder = sf.nn.Encoder(
    ...   feature_map=sf.feature_map("posrf", "orf", num_features=16))
    >>> x = jnp.ones((1, 5, 16))
    >>> encoder.apply(encoder.init(jax.random.key(0), x), x).shape
    (1, 5, 16)
  """

  num_layers: int = 2
  num_heads: int = 2
  head_dim: int = 32
  mlp_dim: int = 128
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  max_len: int | None = None
  is_causal: bool = False
  share_projection: bool = False
  dropout_rate: float = 0.1
  dtype: Any = None
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """``[B, T, D]`` and a mask ``[B, T]`` or None -> ``[B, T, D]``."""

    def run(layer, x, mask):
      return layer(x, mask, decode=decode, deterministic=deterministic)

    if self.remat:
      run = nn.remat(run)
    for index in range(self.num_layers):
      layer = part_of(self, EncoderLayer, name=f"layer_{index}")
      x = run(layer, x, mask)
    return nn.LayerNorm(dtype=self.dtype, name="norm")(x)
