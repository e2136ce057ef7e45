"""Sequence classifier of the Spectraformer paper, for Long Range Arena."""

import functools

import flax.linen as nn

from spectraformer_jax.nn.config import ModelFields, PooledFields
from spectraformer_jax.nn.inputs import Tokens
from spectraformer_jax.nn.sequence_encoder import SequenceEncoder
from spectraformer_jax.typing import Array


class Classifier(PooledFields):
  """Maps token sequences to class logits.

  The defaults are those of the Spectraformer paper's model.

  Attributes:
    vocab_size: number of token ids.
    num_classes: number of classes.
    max_len: longest sequence; size of the table of learned positions.
    pooling, pooled_norm, batch_axis: see `SequenceEncoder`.
    embed_dim, num_layers, ..., remat: see `EncoderConfig`.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> model = sf.nn.Classifier(
    ...   vocab_size=32, num_classes=10, max_len=8,
    ...   feature_map=sf.feature_map("oprf", "orf", num_features=16))
    >>> tokens, length = jnp.ones((2, 8), int), jnp.array([8, 3])
    >>> variables = model.init(jax.random.key(0), tokens, length)
    >>> model.apply(variables, tokens, length).shape
    (2, 10)
  """

  vocab_size: int
  num_classes: int
  max_len: int

  @nn.compact
  def __call__(
    self, tokens: Tokens, length: Array, *, deterministic: bool = True
  ) -> Array:
    """Classifies.

    Args:
      tokens: ``[B, T]`` ints in [0, vocab_size), T at most `max_len`; see
        `TokenEncoder` for other ints.
      length: ``[B]`` ints, the number of real tokens of each row: the rest is
        padding, whose content has no influence.
      deterministic: False in training: applies dropout (which needs an rng
        "dropout") and updates running statistics.

    Returns:
      Logits ``[B, num_classes]`` float32.

    Raises:
      ValueError: a sequence longer than `max_len`, a token out of the
        vocabulary, or unknown `pooling` or `pooled_norm`.
    """
    encoder = SequenceEncoder.from_config(self)
    nn.share_scope(self, encoder)
    x = encoder(tokens, length, deterministic=deterministic)
    return class_logits(self, self.num_classes, x)


def class_logits(config: ModelFields, num_classes: int, x: Array) -> Array:
  """Applies the classification head, inside a compact method.

  Args:
    config: the module that the head belongs to.
    num_classes: number of logits.
    x: ``[B, E]`` float32.

  Returns:
    ``[B, num_classes]`` float32.
  """
  dense = functools.partial(nn.Dense, param_dtype=config.param_dtype)
  hidden = dense(config.mlp_dim, name="head_hidden")(x)
  return dense(num_classes, name="head_logits")(nn.relu(hidden))
