"""Classifier of pairs of sequences, as in Long Range Arena's Retrieval."""

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.nn.classifier import class_logits
from spectraformer_jax.nn.config import PooledFields
from spectraformer_jax.nn.inputs import (
  Tokens,
  check_tokens,
  real_positions,
  token_ids,
)
from spectraformer_jax.nn.sequence_encoder import SequenceEncoder
from spectraformer_jax.typing import Array


class DualClassifier(PooledFields):
  """Maps pairs of token sequences to class logits.

  One encoder reads both sequences; with a and b for its pooled outputs, an MLP
  classifies ``[a, b, a * b, a - b]`` (Tay et al., "Long Range Arena", 2021,
  section 2.2.3).

  Attributes:
    vocab_size, num_classes, max_len: see `Classifier`.
    pooling, pooled_norm, batch_axis: see `SequenceEncoder`.
    embed_dim, num_layers, ..., remat: see `EncoderConfig`.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> model = sf.nn.DualClassifier(
    ...   vocab_size=257, num_classes=2, max_len=8,
    ...   feature_map=sf.feature_map("oprf", "orf", num_features=16))
    >>> pair = (jnp.ones((2, 8), int), jnp.array([8, 3])) * 2
    >>> variables = model.init(jax.random.key(0), *pair)
    >>> model.apply(variables, *pair).shape
    (2, 2)
  """

  vocab_size: int
  num_classes: int
  max_len: int

  @nn.compact
  def __call__(
    self,
    tokens: Tokens,
    length: Array,
    tokens_2: Tokens,
    length_2: Array,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Classifies.

    Args:
      tokens: ``[B, T]`` ints, as for `Classifier`.
      length: ``[B]`` ints, the number of real tokens of each row: the rest is
        padding.
      tokens_2: ``[B, S]`` ints, S at most `max_len`.
      length_2: ``[B]`` ints, for `tokens_2`.
      deterministic: as for `Classifier`.

    Returns:
      Logits ``[B, num_classes]`` float32.

    Raises:
      ValueError: an error of `Classifier`, or two batches of different size.
    """
    tokens = check_tokens(tokens)
    tokens_2 = check_tokens(tokens_2, "tokens_2")
    if tokens.shape[0] != tokens_2.shape[0]:
      raise ValueError(
        "tokens and tokens_2 must share batch, got tokens.shape="
        f"{tokens.shape}, tokens_2.shape={tokens_2.shape}."
      )
    # Encode both as one batch: one program, and larger matrix products.
    longest = max(tokens.shape[1], tokens_2.shape[1])
    batches = []
    for x, n, suffix in ((tokens, length, ""), (tokens_2, length_2, "_2")):
      mask = real_positions(x, n, f"length{suffix}")
      ids = token_ids(x, self.vocab_size, mask, f"tokens{suffix}")
      batches.append(jnp.pad(ids, ((0, 0), (0, longest - x.shape[1]))))
    lengths = jnp.concatenate([jnp.asarray(n) for n in (length, length_2)])
    encoder = SequenceEncoder.from_config(self)
    nn.share_scope(self, encoder)
    x = encoder(jnp.concatenate(batches), lengths, deterministic=deterministic)
    a, b = jnp.split(x, 2)
    x = jnp.concatenate([a, b, a * b, a - b], axis=-1)
    return class_logits(self, self.num_classes, x)
