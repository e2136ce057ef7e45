"""Encoder and decoder: map one sequence of tokens to another."""

import flax.linen as nn

from spectraformer_jax.nn.config import ModelFields
from spectraformer_jax.nn.inputs import Tokens, check_tokens, real_positions
from spectraformer_jax.nn.language_model import token_logits
from spectraformer_jax.nn.token_encoder import TokenEncoder
from spectraformer_jax.typing import Array


class Seq2Seq(ModelFields):
  """Encoder-decoder Transformer: returns logits of a target's next tokens.

  The encoder reads a source in both directions; the decoder is causal in the
  target and attends to the encoder's output. For decoding, each layer keeps a
  sum over the target's keys and one over the source's, both of constant size;
  with a window or sinks, it keeps those keys of the target as well.

  Attributes:
    vocab_size: number of token ids of source and target, each of which has an
      embedding table of its own.
    max_len: longest source, and longest target.
    embed_dim, num_layers, ..., remat: of encoder and decoder alike; see
      `EncoderConfig`. The feature map must serve causal attention, as for a
      `LanguageModel`. `window` and `num_sinks` hold for the self-attention of
      both; attention to the source estimates all keys.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
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

  @nn.compact
  def __call__(
    self,
    source: Tokens | None,
    source_length: Array | None,
    target: Tokens,
    target_length: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Computes the logits of the token after each position of the target.

    Args:
      source: ``[B, S]`` ints in [0, vocab_size), S at most `max_len`; None,
        with `decode`, means the source of an earlier call.
      source_length: ``[B]`` ints, the number of real tokens of each source: the
        rest is padding, whose content has no influence; None for no padding.
      target: ``[B, T]`` ints in [0, vocab_size), T at most `max_len`: a start
        token, and the tokens so far.
      target_length: ``[B]`` ints: like `source_length`, for the target.
      decode: the target continues that of earlier calls, as for
        `LanguageModel`. The first call reads the source; later ones take None.
      deterministic: False in training: applies dropout (which needs an rng
        "dropout") and updates running statistics.

    Returns:
      ``[B, T, vocab_size]`` float32.

    Raises:
      ValueError: an error of `LanguageModel` about either sequence, or source
        and target of different batch sizes.
    """
    target = check_tokens(target, "target")
    memory = memory_mask = None
    if source is not None:
      source = check_tokens(source, "source")
      if source.shape[0] != target.shape[0]:
        raise ValueError(
          "source and target must share batch, got source.shape="
          f"{source.shape}, target.shape={target.shape}."
        )
      memory_mask = real_positions(source, source_length, "source_length")
      encoder = TokenEncoder.from_config(self, name="encoder")
      memory = encoder(source, memory_mask, deterministic=deterministic)
    decoder = TokenEncoder.from_config(
      self, name="decoder", is_causal=True, attends_memory=True
    )
    x = decoder(
      target,
      real_positions(target, target_length, "target_length"),
      memory=memory,
      memory_mask=memory_mask,
      decode=decode,
      deterministic=deterministic,
    )
    return token_logits(self, self.vocab_size, x)
