"""Token and position embeddings, and an encoder: the body of all models."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.meshes import is_on_explicit_axes, look_up
from spectraformer_jax.nn.config import ModelFields
from spectraformer_jax.nn.dropout import Dropout
from spectraformer_jax.nn.encoder import Encoder
from spectraformer_jax.nn.inputs import (
  Tokens,
  check_flags,
  check_rows,
  check_tokens,
  token_ids,
)
from spectraformer_jax.nn.positions import POSITIONS, next_positions, sinusoids
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array

_DEVIATION = 0.02  # standard deviation of the entries of initial embeddings
_EMBED_INIT = nn.initializers.normal(_DEVIATION)


class Embed(nn.Embed):
  """`flax.linen.Embed` that also takes tokens on a mesh with Explicit axes."""

  def __call__(self, inputs: Array) -> Array:
    """Maps ``[B, T]`` to ``[B, T, D]``."""
    if not is_on_explicit_axes(inputs):
      return super().__call__(inputs)
    table = self.embedding.astype(self.dtype or self.embedding.dtype)
    return look_up(table, inputs)


class TokenEncoder(ModelFields, kw_only=True):
  """Embeds tokens and positions, and encodes them.

  Attributes:
    vocab_size: number of token ids.
    max_len: longest sequence; size of the table of learned positions.
    is_causal, attends_memory: see `EncoderLayer`.
    prepend_cls: put a learned token in front of the sequence.
    embed_dim, num_layers, ..., remat: see `EncoderConfig`.
  """

  vocab_size: int
  max_len: int
  is_causal: bool = False
  attends_memory: bool = False
  prepend_cls: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Tokens,
    mask: Array | None,
    *,
    segment_ids: Array | None = None,
    memory: Array | None = None,
    memory_mask: Array | None = None,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Maps ``[B, T]`` to ``[B, T, D]``; to ``[B, T + 1, D]`` if `prepend_cls`.

    Args:
      tokens: ints, T at most `max_len`. At a real position, a token outside
        [0, vocab_size) is an error if it is known before the program runs;
        otherwise its output is NaN.
      mask: ``[B, T]``, True at real positions; None for all.
      segment_ids: ints ``[B, T]`` of packed rows: attention stays inside each
        segment, and positions start at 0 in each.
      memory: ``[B, S, E]``; needs `attends_memory`.
      memory_mask: ``[B, S]``, True at real positions of the memory; None for
        all.
      decode: continue the sequence of earlier calls; see `LanguageModel`.
      deterministic: False in training.

    Raises:
      ValueError: a sequence longer than `max_len`, a token out of the
        vocabulary, unknown `positions`, or `segment_ids` with `prepend_cls`.
    """
    check_flags(decode=decode, deterministic=deterministic)
    tokens = check_tokens(tokens)
    check_choice("positions", self.positions, POSITIONS)
    if tokens.shape[1] > self.max_len:
      raise ValueError(
        f"tokens.shape={tokens.shape} is longer than max_len={self.max_len}."
      )
    if self.prepend_cls and segment_ids is not None:
      raise ValueError(
        "segment_ids with prepend_cls: the token in front of a row cannot "
        "belong to all its segments."
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
      embedding = self._position_embedding(x, mask, segment_ids, decode)
      x = x + embedding.astype(x.dtype)
    if self.prepend_cls:
      token = self.param(
        "cls_token", _EMBED_INIT, (1, 1, self.embed_dim), self.param_dtype
      )
      token = jnp.broadcast_to(token, (x.shape[0], 1, self.embed_dim))
      x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
      if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
    x = Dropout(self.dropout_rate)(x, deterministic=deterministic)
    encoder = Encoder.from_config(
      self,
      name="encoder",
      max_len=self.max_len + self.prepend_cls,
      rotary=self.positions == "rotary",
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

  def _position_embedding(
    self,
    x: Array,
    mask: Array | None,
    segment_ids: Array | None,
    decode: bool,
  ) -> Array:
    """Returns ``[B, T, D]``, or ``[1, T, D]`` if all rows have the same.

    The embedding is NaN at positions from `max_len` on.
    """
    table = self.param(
      "position_embedding",
      _sinusoids_init if self.positions == "sinusoidal" else _EMBED_INIT,
      (self.max_len, self.embed_dim),
      self.param_dtype,
    )
    if segment_ids is None and not decode:
      return table[None, : x.shape[1]]
    index = next_positions(self, x, mask, segment_ids, decode)
    return look_up(table, index, mode="fill", fill_value=jnp.nan)


def _sinusoids_init(rng: Array, shape: tuple[int, int], dtype: Any) -> Array:
  """Returns `sinusoids`, with the standard deviation of other embeddings."""
  del rng
  return (_DEVIATION * sinusoids(*shape)).astype(dtype)
