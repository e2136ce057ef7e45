"""From tokens to vectors: what classifiers and language models share."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.nn.dropout import Dropout
from spectraformer_jax.nn.encoder import Encoder
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.nn.positions import (
  POSITIONS,
  next_positions,
  sinusoids,
)
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array

_DEVIATION = 0.02
_EMBED_INIT = nn.initializers.normal(_DEVIATION)


class TokenEncoder(nn.Module):
  """Embeds tokens and positions, and encodes them.

  Attributes:
    vocab_size: number of token ids.
    max_len: longest sequence; size of the table of learned positions.
    embed_dim: D.
    positions: "learned": a table added to the embeddings; "sinusoidal": the
      same, but it starts from `sinusoids`, so that near positions are alike;
      "rotary": queries and keys are turned by them, see `rotate`; "none": the
      order of the tokens is not told.
    prepend_cls: put a learned token in front of the sequence.
    num_layers, num_heads, head_dim, mlp_dim, mlp, norm, feature_map, attention,
      attention_kwargs, is_causal, share_projection, dropout_rate, dtype,
      remat: see `Encoder`.
  """

  vocab_size: int
  max_len: int
  embed_dim: int = 64
  num_layers: int = 2
  num_heads: int = 2
  head_dim: int = 32
  mlp_dim: int = 128
  mlp: str = "gelu"
  norm: str = "pre"
  positions: str = "learned"
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  is_causal: bool = False
  share_projection: bool = False
  dropout_rate: float = 0.1
  prepend_cls: bool = False
  dtype: Any = None
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    mask: Array | None,
    *,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """``[B, T]`` ints -> ``[B, T, D]``, ``[B, T + 1, D]`` with `prepend_cls`.

    Args:
      tokens: T is at most `max_len`.
      mask: ``[B, T]``, True at real positions, or None for all.
      decode: the tokens follow those of earlier calls; see `LanguageModel`.
      deterministic: False in training.

    Raises:
      ValueError: a sequence longer than `max_len`, or unknown `positions`.
    """
    if self.positions not in POSITIONS:
      raise ValueError(
        f"Unknown positions {self.positions!r}."
        f"{nearest(self.positions, POSITIONS)}"
      )
    if tokens.shape[1] > self.max_len:
      raise ValueError(
        f"tokens.shape={tokens.shape} is longer than max_len={self.max_len}."
      )
    x = nn.Embed(
      self.vocab_size,
      self.embed_dim,
      embedding_init=_EMBED_INIT,
      dtype=self.dtype,
      name="token_embedding",
    )(tokens.astype(jnp.int32))
    if self.positions in ("learned", "sinusoidal"):
      x = x + self._learned_positions(tokens.shape[1], decode).astype(x.dtype)
    if self.prepend_cls:
      token = self.param("cls_token", _EMBED_INIT, (1, 1, self.embed_dim))
      token = jnp.broadcast_to(token, (x.shape[0], 1, self.embed_dim))
      x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
      if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
    x = Dropout(self.dropout_rate)(x, deterministic=deterministic)
    longest = self.max_len + self.prepend_cls
    rotary = self.positions == "rotary"
    encoder = part_of(
      self, Encoder, name="encoder", max_len=longest, rotary=rotary
    )
    return encoder(x, mask, decode=decode, deterministic=deterministic)

  def _learned_positions(self, length: int, decode: bool) -> Array:
    """Embeddings ``[1, T, D]`` of the next positions; NaN beyond `max_len`."""
    start = _EMBED_INIT
    if self.positions == "sinusoidal":
      start = lambda key, shape: _DEVIATION * sinusoids(*shape)
    table = self.param(
      "position_embedding", start, (self.max_len, self.embed_dim)
    )
    if not decode:
      return table[None, :length]
    index = next_positions(self, length, decode)
    return table.at[index].get(mode="fill", fill_value=jnp.nan)[None]
