"""Encoder and decoder: one sequence of tokens to another."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.inputs import check_tokens
from spectraformer_jax.nn.language_model import real_positions, token_logits
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.nn.token_encoder import TokenEncoder
from spectraformer_jax.typing import Array


class Seq2Seq(nn.Module):
  """Transformer of two stacks: the logits of each next token of a target.

  The encoder reads a source in both directions; the decoder is causal in the
  target and attends to the encoder's output. Decoding needs a sum over the
  target's keys and one over the source's for each layer, of constant size.

  Attributes:
    vocab_size: number of token ids of source and target, which have tables of
      their own.
    max_len: longest source, and longest target.
    embed_dim, num_layers, num_heads, head_dim, mlp_dim, mlp, norm, positions,
      feature_map, attention, attention_kwargs, share_projection,
      num_key_value_heads, dropout_rate, dtype, param_dtype, remat: of both
      stacks, see `TokenEncoder`. The feature map must be fit for causal
      attention, as that of a `LanguageModel`.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> model = sf.nn.Seq2Seq(
    ...   vocab_size=32, max_len=16,
    ...   feature_map=sf.feature_map("posrf", "orf", num_features=16))
    >>> source, length = jnp.ones((2, 9), int), jnp.array([9, 4])
    >>> target = jnp.zeros((2, 5), int)
    >>> variables = model.init(jax.random.key(0), source, length, target)
    >>> model.apply(variables, source, length, target).shape
    (2, 5, 32)
    >>> start = target[:, :1]
    >>> sf.nn.generate(
    ...   model, variables, start, num_tokens=3, source=source,
    ...   source_length=length).shape
    (2, 3)
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
  share_projection: bool = False
  num_key_value_heads: int | None = None
  dropout_rate: float = 0.1
  dtype: Any = None
  param_dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    source: Array | None,
    source_length: Array | None,
    target: Array,
    target_length: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Logits of the token after each position of the target.

    Args:
      source: ``[B, S]`` ints in [0, vocab_size), S at most `max_len`; None with
        `decode`: that of the call before.
      source_length: ``[B]`` ints: positions from there on are padding, and what
        they hold has no influence; None for none.
      target: ``[B, T]`` ints in [0, vocab_size), T at most `max_len`: a start
        token, and the tokens so far.
      target_length: ``[B]`` ints, likewise.
      decode: the target follows those of earlier calls, as for `LanguageModel`.
        The first call reads the source; later ones take None for it.
      deterministic: False in training: dropout (needs rng "dropout") and
        updates of running statistics.

    Returns:
      ``[B, T, vocab_size]`` float32.

    Raises:
      ValueError: what `LanguageModel` refuses for one of the two sequences, or
        batches that differ.
    """
    target = check_tokens(target, "target")
    memory = memory_mask = None
    if source is not None:
      source = check_tokens(source, "source")
      if source.shape[0] != target.shape[0]:
        raise ValueError(
          "source and target must have as many rows, got source.shape="
          f"{source.shape}, target.shape={target.shape}."
        )
      memory_mask = real_positions(source, source_length, "source_length")
      encoder = part_of(self, TokenEncoder, name="encoder")
      memory = encoder(source, memory_mask, deterministic=deterministic)
    decoder = part_of(
      self, TokenEncoder, name="decoder", is_causal=True, attends_memory=True
    )
    x = decoder(
      target,
      real_positions(target, target_length, "target_length"),
      memory=memory,
      memory_mask=memory_mask,
      decode=decode,
      deterministic=deterministic,
    )
    return token_logits(self, x)
