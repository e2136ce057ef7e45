"""Transformer encoder."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.attention import SpectralSelfAttention
from spectraformer_jax.nn.by_token import by_token
from spectraformer_jax.nn.cross_attention import SpectralCrossAttention
from spectraformer_jax.nn.dropout import Dropout
from spectraformer_jax.nn.inputs import check_flags, check_rows, without_padding
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array

MLPS = ("gelu", "gated")
NORMS = ("pre", "post")


class EncoderLayer(nn.Module):
  """Attention and MLP, each with a LayerNorm and beside a residual.

  Attributes:
    attends_memory: between the two, attention to a memory, likewise: the layer
      of a decoder.
    mlp_dim: hidden width of the MLP.
    mlp: "gelu": ``out(gelu(hidden(x)))``; "gated":
      ``out(silu(gate(x)) * hidden(x))``, half as many parameters again
      (Shazeer, "GLU Variants Improve Transformer", 2020: SwiGLU).
    norm: where the LayerNorm is: "pre": ``x + f(norm(x))``, "post":
      ``norm(x + f(x))``, as in the first Transformers.
    dropout_rate: after attention, and twice in the MLP.
    dtype, param_dtype: of all dense layers and norms, and of their parameters.
    num_heads, head_dim, feature_map, attention, attention_kwargs, max_len,
      is_causal, rotary, share_projection, num_key_value_heads: see
      `SpectralSelfAttention`.
  """

  num_heads: int = 2
  head_dim: int = 32
  mlp_dim: int = 128
  mlp: str = "gelu"
  norm: str = "pre"
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  max_len: int | None = None
  is_causal: bool = False
  attends_memory: bool = False
  rotary: bool = False
  share_projection: bool = False
  num_key_value_heads: int | None = None
  dropout_rate: float = 0.1
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None = None,
    *,
    segment_ids: Array | None = None,
    memory: Array | None = None,
    memory_mask: Array | None = None,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """``[B, T, D]`` and a mask ``[B, T]`` or None -> ``[B, T, D]``.

    Arguments are those of `SpectralSelfAttention`, and with `attends_memory`
    of `SpectralCrossAttention`; what padding holds has no influence.

    Raises:
      ValueError: unknown `mlp` or `norm`, a memory without `attends_memory`,
        and what the attentions refuse.
    """
    check_flags(decode=decode, deterministic=deterministic)
    if memory is not None and not self.attends_memory:
      raise ValueError("memory needs attends_memory=True.")
    mask, segment_ids = check_rows(x, mask, segment_ids)
    x = without_padding(x, mask)
    for name, known in (("mlp", MLPS), ("norm", NORMS)):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(f"Unknown {name} {value!r}.{nearest(value, known)}")
    attention = part_of(self, SpectralSelfAttention, name="attention")
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def drop(y):
      return Dropout(self.dropout_rate)(y, deterministic=deterministic)

    def attend(y):
      return attention(
        y,
        mask,
        segment_ids=segment_ids,
        decode=decode,
        deterministic=deterministic,
      )

    def attend_memory(y):
      cross = part_of(self, SpectralCrossAttention, name="cross_attention")
      return cross(
        y,
        memory,
        mask,
        memory_mask,
        decode=decode,
        deterministic=deterministic,
      )

    def dense(size, name=None):
      return nn.Dense(size, name=name, **dtypes)

    def feed_forward(y):
      hidden = dense(self.mlp_dim)(y)
      if self.mlp == "gated":
        hidden = nn.silu(dense(self.mlp_dim, "gate")(y)) * hidden
      else:
        hidden = nn.gelu(hidden)
      return dense(x.shape[-1])(drop(hidden))

    def beside(part, x):
      norm = nn.LayerNorm(**dtypes)
      if self.norm == "pre":
        return x + drop(part(norm(x)))
      return norm(x + drop(part(x)))

    def second_half(layer, x):
      del layer
      return beside(feed_forward, x)

    x = beside(attend, x)
    if self.attends_memory:
      x = beside(attend_memory, x)
    return by_token(self, second_half, x)


class Encoder(nn.Module):
  """A stack of `EncoderLayer`; with norm="pre" a LayerNorm follows it.

  Attributes:
    num_layers: depth.
    attends_memory: see `EncoderLayer`.
    remat: in the backward pass, compute each layer's values again instead of
      keeping them: less memory, more time, the same numbers.
    num_heads, head_dim, mlp_dim, mlp, norm, feature_map, attention,
      attention_kwargs, max_len, is_causal, rotary, share_projection,
      num_key_value_heads, dropout_rate, dtype, param_dtype: see `EncoderLayer`.

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
  mlp: str = "gelu"
  norm: str = "pre"
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  max_len: int | None = None
  is_causal: bool = False
  attends_memory: bool = False
  rotary: bool = False
  share_projection: bool = False
  num_key_value_heads: int | None = None
  dropout_rate: float = 0.1
  dtype: Any = None
  param_dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None = None,
    *,
    segment_ids: Array | None = None,
    memory: Array | None = None,
    memory_mask: Array | None = None,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """``[B, T, D]`` and a mask ``[B, T]`` or None -> ``[B, T, D]``.

    Arguments and errors are those of `EncoderLayer`.
    """

    def run(layer, x, mask, segment_ids, memory, memory_mask):
      return layer(
        x,
        mask,
        segment_ids=segment_ids,
        memory=memory,
        memory_mask=memory_mask,
        decode=decode,
        deterministic=deterministic,
      )

    if self.remat:
      run = nn.remat(run)
    for index in range(self.num_layers):
      layer = part_of(self, EncoderLayer, name=f"layer_{index}")
      x = run(layer, x, mask, segment_ids, memory, memory_mask)
    if self.norm == "post":
      return x
    return nn.LayerNorm(
      dtype=self.dtype, param_dtype=self.param_dtype, name="norm"
    )(x)
