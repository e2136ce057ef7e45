"""Classifier of pairs of sequences: the model for Retrieval."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.classifier import class_logits
from spectraformer_jax.nn.inputs import check_length, check_tokens, token_ids
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.nn.sequence_encoder import SequenceEncoder
from spectraformer_jax.typing import Array


class DualClassifier(nn.Module):
  """Pairs of token sequences to class logits.

  One encoder reads both; with a and b for its pooled outputs, an MLP classifies
  ``[a, b, a * b, a - b]`` (Tay et al., "Long Range Arena", 2021, section
  2.2.3).

  Attributes:
    vocab_size, num_classes, max_len, embed_dim, pooling, pooled_norm,
      positions: see `Classifier`.
    num_layers, num_heads, head_dim, mlp_dim, mlp, norm, feature_map, attention,
      attention_kwargs, share_projection, num_key_value_heads, dropout_rate,
      dtype, param_dtype, remat: see `Encoder`.

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
    self,
    tokens: Array,
    length: Array,
    tokens_2: Array,
    length_2: Array,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Classifies.

    Args:
      tokens: ``[B, T]`` ints, as for `Classifier`.
      length: ``[B]`` ints: positions from there on are padding.
      tokens_2: ``[B, S]`` ints, S at most `max_len`.
      length_2: ``[B]`` ints, for `tokens_2`.
      deterministic: as for `Classifier`.

    Returns:
      Logits ``[B, num_classes]`` float32.

    Raises:
      ValueError: as `Classifier`, and where the two have not as many rows.
    """
    tokens = check_tokens(tokens)
    tokens_2 = check_tokens(tokens_2, "tokens_2")
    if tokens.shape[0] != tokens_2.shape[0]:
      raise ValueError(
        "tokens and tokens_2 must have as many rows, got tokens.shape="
        f"{tokens.shape}, tokens_2.shape={tokens_2.shape}."
      )
    length = check_length(length, tokens)
    length_2 = check_length(length_2, tokens_2, "length_2")
    pair = (tokens, length, "tokens"), (tokens_2, length_2, "tokens_2")
    tokens, tokens_2 = (
      token_ids(
        rows, self.vocab_size, checks.positions_before(n, rows.shape[1]), name
      )
      for rows, n, name in pair
    )
    # As one batch: one program for both, and rows enough to fill a device.
    longest = max(tokens.shape[1], tokens_2.shape[1])
    both = jnp.concatenate(
      [
        jnp.pad(rows, ((0, 0), (0, longest - rows.shape[1])))
        for rows in (tokens, tokens_2)
      ]
    )
    lengths = jnp.concatenate([length, length_2])
    encoder = part_of(self, SequenceEncoder)
    x = encoder(both, lengths, deterministic=deterministic)
    a, b = jnp.split(x, 2)
    x = jnp.concatenate([a, b, a * b, a - b], axis=-1)
    return class_logits(self, x)
