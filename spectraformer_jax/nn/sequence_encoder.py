"""From tokens to one vector per sequence: what the classifiers share."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.nn.token_encoder import TokenEncoder
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array

POOLINGS = ("cls", "mean", "attention")


class SequenceEncoder(nn.Module):
  """Embeds tokens and positions, encodes them, and pools.

  Attributes:
    pooling: "mean" over the real positions; "cls": a learned token in front of
      the sequence, whose output is taken; "attention": a mean over the real
      positions with weights ``softmax(w . x)``, w learned.
    vocab_size, max_len, embed_dim, num_layers, num_heads, head_dim, mlp_dim,
      mlp, norm, positions, feature_map, attention, attention_kwargs,
      share_projection, dropout_rate, dtype: see `TokenEncoder`.

  Example:
    >>> import jax
    >>> encoder = SequenceEncoder(
    ...   vocab_size=32, max_len=8, attention="softmax")
    >>> tokens, length = jnp.ones((2, 8), int), jnp.array([8, 3])
    >>> variables = encoder.init(jax.random.key(0), tokens, length)
    >>> encoder.apply(variables, tokens, length).shape
    (2, 64)
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
  dropout_rate: float = 0.1
  pooling: str = "mean"
  dtype: Any = None
  remat: bool = False

  @nn.compact
  def __call__(
    self, tokens: Array, length: Array, *, deterministic: bool = True
  ) -> Array:
    """``[B, T]`` ints and ``[B]`` ints -> ``[B, D]`` float32.

    Args:
      tokens: T is at most `max_len`.
      length: positions from there on are padding; what they hold has no
        influence.
      deterministic: False in training: dropout (needs rng "dropout") and
        updates of running statistics.

    Raises:
      ValueError: a sequence longer than `max_len`, or unknown `pooling`.
    """
    if self.pooling not in POOLINGS:
      raise ValueError(
        f"Unknown pooling {self.pooling!r}.{nearest(self.pooling, POOLINGS)}"
      )
    mask = checks.positions_before(length, tokens.shape[1])
    encoder = part_of(self, TokenEncoder, prepend_cls=self.pooling == "cls")
    x = encoder(tokens, mask, deterministic=deterministic)
    return self._pool(x.astype(jnp.float32), mask)

  def _pool(self, x: Array, mask: Array) -> Array:
    """``[B, T, D]`` -> ``[B, D]``."""
    if self.pooling == "cls":
      return x[:, 0]
    if self.pooling == "attention":
      score = nn.Dense(1, use_bias=False, name="pooling")(x)
      return weighted_mean(x, score, mask)
    return masked_mean(x, mask)


def weighted_mean(x: Array, score: Array, mask: Array) -> Array:
  """Mean of ``[B, T, D]`` by softmax of ``[B, T, 1]``; zeros without a mask."""
  keep = mask[:, :, None]
  score = jnp.where(keep, score, jnp.finfo(score.dtype).min)
  weight = jnp.where(keep, nn.softmax(score, axis=1), 0.0)
  return jnp.sum(weight * jnp.where(keep, x, 0.0), axis=1)


def masked_mean(x: Array, mask: Array) -> Array:
  """Mean of ``[B, T, D]`` over the real positions; zeros if there are none."""
  keep = mask[:, :, None]
  total = jnp.sum(jnp.where(keep, x, 0.0), axis=1)
  return total / jnp.maximum(jnp.sum(keep, axis=1), 1).astype(x.dtype)
