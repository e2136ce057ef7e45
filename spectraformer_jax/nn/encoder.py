"""Transformer encoder."""

from collections.abc import Callable

import flax.linen as nn

from spectraformer_jax.nn.attention import SpectralSelfAttention
from spectraformer_jax.nn.by_token import by_token
from spectraformer_jax.nn.config import LayerFields
from spectraformer_jax.nn.cross_attention import SpectralCrossAttention
from spectraformer_jax.nn.dropout import Dropout
from spectraformer_jax.nn.inputs import (
  check_flags,
  check_rows,
  without_padding,
)
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array

MLPS = ("gelu", "gated")
NORMS = ("pre", "post")


class EncoderLayer(LayerFields, kw_only=True):
  """Attention and an MLP, each with a LayerNorm and a residual connection.

  Attributes:
    max_len: longest sequence; see `SpectralSelfAttention`.
    is_causal: position i sees positions 0..i.
    attends_memory: between attention and MLP, adds attention to a memory, with
      a LayerNorm and a residual connection of its own: the layer of a decoder.
    rotary: rotates queries and keys by their positions; see `rotate`.
    num_heads, head_dim, ..., param_dtype: see `EncoderConfig`.
  """

  max_len: int | None = None
  is_causal: bool = False
  attends_memory: bool = False
  rotary: bool = False

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
    """Maps ``[B, T, D]``, with a mask ``[B, T]`` or None, to ``[B, T, D]``.

    Takes the arguments of `SpectralSelfAttention` and, with `attends_memory`,
    those of `SpectralCrossAttention`. The content of padding has no influence.

    Raises:
      ValueError: unknown `mlp` or `norm`, a memory without `attends_memory`, or
        an error of the attention modules.
    """
    check_flags(decode=decode, deterministic=deterministic)
    if memory is not None and not self.attends_memory:
      raise ValueError("memory needs attends_memory=True.")
    mask, segment_ids = check_rows(x, mask, segment_ids)
    x = without_padding(x, mask)
    check_choice("mlp", self.mlp, MLPS)
    check_choice("norm", self.norm, NORMS)
    flags = {"decode": decode, "deterministic": deterministic}
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def drop(y: Array) -> Array:
      return Dropout(self.dropout_rate)(y, deterministic=deterministic)

    def attend(y: Array) -> Array:
      attention = SpectralSelfAttention.from_config(self, name="attention")
      return attention(y, mask, segment_ids=segment_ids, **flags)

    def attend_memory(y: Array) -> Array:
      cross = SpectralCrossAttention.from_config(self, name="cross_attention")
      return cross(y, memory, mask, memory_mask, **flags)

    def dense(size: int, name: str | None = None) -> nn.Dense:
      return nn.Dense(size, name=name, **dtypes)

    def feed_forward(y: Array) -> Array:
      hidden = dense(self.mlp_dim)(y)
      if self.mlp == "gated":
        hidden = nn.silu(dense(self.mlp_dim, "gate")(y)) * hidden
      else:
        hidden = nn.gelu(hidden)
      return dense(x.shape[-1])(drop(hidden))

    def with_residual(sublayer: Callable[[Array], Array], x: Array) -> Array:
      norm = nn.LayerNorm(**dtypes)
      if self.norm == "pre":
        return x + drop(sublayer(norm(x)))
      return norm(x + drop(sublayer(x)))

    x = with_residual(attend, x)
    if self.attends_memory:
      x = with_residual(attend_memory, x)
    return by_token(self, lambda _, x: with_residual(feed_forward, x), x)


class Encoder(LayerFields, kw_only=True):
  """A stack of `EncoderLayer`; with norm="pre" a LayerNorm follows it.

  Attributes:
    num_layers: depth.
    remat: see `EncoderConfig`.
    max_len, is_causal, attends_memory, rotary: see `EncoderLayer`.
    num_heads, head_dim, ..., param_dtype: see `EncoderConfig`.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> encoder = sf.nn.Encoder(
    ...   feature_map=sf.feature_map("posrf", "orf", num_features=16))
    >>> x = jnp.ones((1, 5, 16))
    >>> encoder.apply(encoder.init(jax.random.key(0), x), x).shape
    (1, 5, 16)
  """

  num_layers: int = 2
  max_len: int | None = None
  is_causal: bool = False
  attends_memory: bool = False
  rotary: bool = False
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
    """Maps ``[B, T, D]``, with a mask ``[B, T]`` or None, to ``[B, T, D]``.

    Takes the arguments of `EncoderLayer`, and raises its errors.
    """

    # Takes the flags from outside: nn.remat would trace them as arguments.
    def call(layer: EncoderLayer, x: Array, **arrays: Array | None) -> Array:
      return layer(x, **arrays, decode=decode, deterministic=deterministic)

    call_layer = nn.remat(call) if self.remat else call
    for index in range(self.num_layers):
      x = call_layer(
        EncoderLayer.from_config(self, name=f"layer_{index}"),
        x,
        mask=mask,
        segment_ids=segment_ids,
        memory=memory,
        memory_mask=memory_mask,
      )
    if self.norm == "post":
      return x
    return nn.LayerNorm(
      dtype=self.dtype, param_dtype=self.param_dtype, name="norm"
    )(x)
