"""From tokens to one vector per sequence: what the classifiers share."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.nn.encoder import Encoder
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array

POOLINGS = ("cls", "mean")

_EMBED_INIT = nn.initializers.normal(0.02)


class SequenceEncoder(nn.Module):
  """Embeds tokens and positions, encodes them, and pools.

  Attributes:
    vocab_size: number of token ids.
    max_len: longest sequence; size of the table of learned positions.
    embed_dim: D.
    pooling: "mean" over the real positions, or "cls": a learned token in front
      of the sequence, whose output is taken.
    num_layers, num_heads, head_dim, mlp_dim, feature_map, attention,
      share_projection, dropout_rate, dtype, remat: see `Encoder`.

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
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
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
    self._check(tokens)
    mask = jnp.arange(tokens.shape[1])[None, :] < length[:, None]
    x = nn.Embed(
      self.vocab_size,
      self.embed_dim,
      embedding_init=_EMBED_INIT,
      dtype=self.dtype,
      name="token_embedding",
    )(tokens.astype(jnp.int32))
    positions = self.param(
      "position_embedding", _EMBED_INIT, (self.max_len, self.embed_dim)
    )
    x = x + positions[None, : tokens.shape[1]].astype(x.dtype)
    if self.pooling == "cls":
      token = self.param("cls_token", _EMBED_INIT, (1, 1, self.embed_dim))
      token = jnp.broadcast_to(token, (x.shape[0], 1, self.embed_dim))
      x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
      mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
    x = nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)
    x = Encoder(
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      mlp_dim=self.mlp_dim,
      feature_map=self.feature_map,
      attention=self.attention,
      share_projection=self.share_projection,
      dropout_rate=self.dropout_rate,
      dtype=self.dtype,
      remat=self.remat,
      name="encoder",
    )(x, mask, deterministic=deterministic)
    return pool(x.astype(jnp.float32), mask, self.pooling)

  def _check(self, tokens):
    """ValueError for inputs and options that cannot be honoured."""
    if self.pooling not in POOLINGS:
      raise ValueError(
        f"Unknown pooling {self.pooling!r}.{nearest(self.pooling, POOLINGS)}"
      )
    if tokens.shape[1] > self.max_len:
      raise ValueError(
        f"tokens.shape={tokens.shape} is longer than max_len={self.max_len}."
      )


def encoder_of(module: nn.Module) -> SequenceEncoder:
  """The encoder with a module's attributes; its variables are the module's.

  Args:
    module: has every attribute of `SequenceEncoder`; to be called inside its
      compact method.
  """
  names = {field.name for field in dataclasses.fields(SequenceEncoder)}
  names -= {"parent", "name"}
  encoder = SequenceEncoder(**{name: getattr(module, name) for name in names})
  nn.share_scope(module, encoder)
  return encoder


def pool(x: Array, mask: Array, pooling: str) -> Array:
  """``[B, T, D]`` -> ``[B, D]``: the first position, or the masked mean."""
  if pooling == "cls":
    return x[:, 0]
  keep = mask[:, :, None]
  total = jnp.sum(jnp.where(keep, x, 0.0), axis=1)
  return total / jnp.maximum(jnp.sum(keep, axis=1), 1).astype(x.dtype)
