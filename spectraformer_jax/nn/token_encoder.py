"""From tokens to vectors: what classifiers and language models share."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.meshes import is_on_explicit_axes, look_up
from spectraformer_jax.nn.dropout import Dropout
from spectraformer_jax.nn.encoder import Encoder
from spectraformer_jax.nn.inputs import (
  check_flags,
  check_rows,
  check_tokens,
  token_ids,
)
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.nn.positions import POSITIONS, next_positions, sinusoids
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array

_DEVIATION = 0.02
_EMBED_INIT = nn.initializers.normal(_DEVIATION)


class Embed(nn.Embed):
  """Flax's, also of tokens that lie on a mesh with Explicit axes."""

  def __call__(self, inputs: Array) -> Array:
    """Rows of the table, ``[B, T] -> [B, T, D]``."""
    if not is_on_explicit_axes(inputs):
      return super().__call__(inputs)
    (table,) = self.promote_dtype(
      self.embedding, dtype=self.dtype, inexact=False
    )
    return look_up(table, inputs)


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
      attention_kwargs, is_causal, attends_memory, share_projection,
      num_key_value_heads, dropout_rate, dtype, param_dtype, remat: see
      `Encoder`.
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
  attends_memory: bool = False
  share_projection: bool = False
  dropout_rate: float = 0.1
  prepend_cls: bool = False
  num_key_value_heads: int | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    mask: Array | None,
    *,
    segment_ids: Array | None = None,
    memory: Array | None = None,
    memory_mask: Array | None = None,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """``[B, T]`` ints -> ``[B, T, D]``, ``[B, T + 1, D]`` with `prepend_cls`.

    Args:
      tokens: T is at most `max_len`. Those at real positions that are not in
        [0, vocab_size) are an error where they are known before the program
        runs, and give NaN where they are not.
      mask: ``[B, T]``, True at real positions, or None for all.
      segment_ids: ints ``[B, T]`` of packed rows: attention stays inside each,
        and positions start again.
      memory: ``[B, S, E]``, with `attends_memory`.
      memory_mask: ``[B, S]``, True at its real positions, or None for all.
      decode: the tokens follow those of earlier calls; see `LanguageModel`.
      deterministic: False in training.

    Raises:
      ValueError: a sequence longer than `max_len`, a token out of the
        vocabulary, unknown `positions`, or `segment_ids` with `prepend_cls`.
    """
    check_flags(decode=decode, deterministic=deterministic)
    tokens = check_tokens(tokens)
    if self.positions not in POSITIONS:
      raise ValueError(
        f"Unknown positions {self.positions!r}."
        f"{nearest(self.positions, POSITIONS)}"
      )
    if tokens.shape[1] > self.max_len:
      raise ValueError(
        f"tokens.shape={tokens.shape} is longer than max_len={self.max_len}."
      )
    if self.prepend_cls and segment_ids is not None:
      raise ValueError(
        "segment_ids with prepend_cls: one token in front of a row cannot be "
        "of all its segments."
      )
    x = Embed(
      self.vocab_size,
      self.embed_dim,
      embedding_init=_EMBED_INIT,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="token_embedding",
    )(token_ids(tokens, self.vocab_size, mask))
    mask, segment_ids = check_rows(x, mask, segment_ids)
    if self.positions in ("learned", "sinusoidal"):
      table = self._learned_positions(x, mask, segment_ids, decode)
      x = x + table.astype(x.dtype)
    if self.prepend_cls:
      token = self.param(
        "cls_token", _EMBED_INIT, (1, 1, self.embed_dim), self.param_dtype
      )
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
    return encoder(
      x,
      mask,
      segment_ids=segment_ids,
      memory=memory,
      memory_mask=memory_mask,
      decode=decode,
      deterministic=deterministic,
    )

  def _learned_positions(self, x, mask, segment_ids, decode: bool) -> Array:
    """Embeddings of positions, ``[B, T, D]`` or ``[1, T, D]`` for all rows.

    NaN beyond `max_len`.
    """
    start = _EMBED_INIT
    if self.positions == "sinusoidal":
      start = lambda key, shape, dtype: (_DEVIATION * sinusoids(*shape)).astype(
        dtype
      )
    table = self.param(
      "position_embedding",
      start,
      (self.max_len, self.embed_dim),
      self.param_dtype,
    )
    if segment_ids is None and not decode:
      return table[None, : x.shape[1]]
    index = next_positions(self, x, mask, segment_ids, decode)
    return look_up(table, index, mode="fill", fill_value=jnp.nan)
