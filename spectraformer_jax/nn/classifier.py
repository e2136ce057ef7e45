"""Sequence classifier: the paper's model for Long Range Arena."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.nn.sequence_encoder import SequenceEncoder
from spectraformer_jax.typing import Array


class Classifier(nn.Module):
  """Token sequences to class logits; defaults are the paper's model.

  Attributes:
    vocab_size: number of token ids.
    num_classes: number of classes.
    max_len: longest sequence; size of the table of learned positions.
    embed_dim: D.
    pooling: "mean", "cls" or "attention"; see `SequenceEncoder`.
    pooled_norm, batch_axis: "none" or "batch"; see `SequenceEncoder`.
    positions: "learned", "sinusoidal", "rotary" or "none"; see `TokenEncoder`.
    num_layers, num_heads, head_dim, mlp_dim, mlp, norm, feature_map, attention,
      attention_kwargs, share_projection, num_key_value_heads, dropout_rate,
      dtype, param_dtype, remat: see `Encoder`.

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
  dropout_rate: float = 0.1
  pooling: str = "mean"
  pooled_norm: str = "none"
  batch_axis: str | None = None
  num_key_value_heads: int | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self, tokens: Array, length: Array, *, deterministic: bool = True
  ) -> Array:
    """Classifies.

    Args:
      tokens: ``[B, T]`` ints in [0, vocab_size), T at most `max_len`; others
        at real positions are an error where they are known before the program
        runs, and give NaN where they are not.
      length: ``[B]`` ints: positions from there on are padding; what they hold
        has no influence.
      deterministic: False in training: dropout (needs rng "dropout") and
        updates of running statistics.

    Returns:
      Logits ``[B, num_classes]`` float32.

    Raises:
      ValueError: a sequence longer than `max_len`, a token out of the
        vocabulary, or unknown `pooling` or `pooled_norm`.
    """
    encoder = part_of(self, SequenceEncoder)
    x = encoder(tokens, length, deterministic=deterministic)
    return class_logits(self, x)


def class_logits(module: nn.Module, x: Array) -> Array:
  """``[B, E] -> [B, num_classes]``: the head, in the caller's compact method.

  Args:
    module: with the attributes of `Classifier`.
    x: float32.
  """
  hidden = nn.Dense(
    module.mlp_dim, param_dtype=module.param_dtype, name="head_hidden"
  )
  logits = nn.Dense(
    module.num_classes, param_dtype=module.param_dtype, name="head_logits"
  )
  return logits(nn.relu(hidden(x)))
