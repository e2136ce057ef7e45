"""From tokens to one vector per sequence: what the classifiers share."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.inputs import check_length, check_tokens
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.nn.token_encoder import TokenEncoder
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array

POOLINGS = ("cls", "mean", "attention")
POOLED_NORMS = ("none", "batch")

_DECAY = 0.9  # of the running moments
_EPS = 1e-6


class SequenceEncoder(nn.Module):
  """Embeds tokens and positions, encodes them, and pools.

  Attributes:
    pooling: "mean" over the real positions; "cls": a learned token in front of
      the sequence, whose output is taken; "attention": a mean over the real
      positions with weights ``softmax(w . x)``, w learned.
    pooled_norm: "batch": a `BatchNorm` of the pooled vector; "none".
    batch_axis: the mapped axis over which a batch is divided, if any: see
      `BatchNorm`.
    vocab_size, max_len, embed_dim, num_layers, num_heads, head_dim, mlp_dim,
      mlp, norm, positions, feature_map, attention, attention_kwargs,
      share_projection, num_key_value_heads, dropout_rate, dtype, param_dtype,
      remat: see `TokenEncoder`.

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
  pooled_norm: str = "none"
  num_key_value_heads: int | None = None
  batch_axis: str | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
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
      ValueError: a sequence longer than `max_len`, or unknown `pooling` or
        `pooled_norm`.
    """
    for name, known in (("pooling", POOLINGS), ("pooled_norm", POOLED_NORMS)):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(f"Unknown {name} {value!r}.{nearest(value, known)}")
    tokens = check_tokens(tokens)
    length = check_length(length, tokens)
    mask = checks.positions_before(length, tokens.shape[1])
    encoder = part_of(self, TokenEncoder, prepend_cls=self.pooling == "cls")
    x = encoder(tokens, mask, deterministic=deterministic)
    x = self._pool(x.astype(jnp.float32), mask)
    if self.pooled_norm == "batch":
      norm = BatchNorm(self.batch_axis, name="pooled_norm")
      x = norm(x, deterministic=deterministic)
    return x

  def _pool(self, x: Array, mask: Array) -> Array:
    """``[B, T, D]`` -> ``[B, D]``."""
    if self.pooling == "cls":
      return x[:, 0]
    if self.pooling == "attention":
      score = nn.Dense(
        1, use_bias=False, param_dtype=self.param_dtype, name="pooling"
      )(x)
      return weighted_mean(x, score, mask)
    return masked_mean(x, mask)


class BatchNorm(nn.Module):
  """Each entry of ``[B, D]`` with mean 0 and variance 1 over the batch.

  What all examples share, and so tells nothing, is gone, and what is left has
  the scale that the layers after it expect (Ioffe and Szegedy, "Batch
  Normalization", 2015). Deterministic calls take running moments, kept in the
  collection "feature_stats". `flax.linen.BatchNorm` has its moments in a
  collection of its own, which checkpoints and training steps would have to
  carry beside that one.

  Attributes:
    axis_name: of `jax.pmap`, `jax.vmap` or `jax.shard_map`, where each device
      has as many examples: moments are those of all of them. None: those of
      the examples it is called with.
  """

  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, *, deterministic: bool = True) -> Array:
    """``[B, D]`` -> ``[B, D]``, float32.

    Raises:
      ValueError: one example in training, of which nothing would be left.
    """
    size = (1, x.shape[-1])
    scale = self.param("scale", nn.initializers.ones, size[1:])
    bias = self.param("bias", nn.initializers.zeros, size[1:])
    running = (
      self.variable("feature_stats", "mean", jnp.zeros, size),
      self.variable("feature_stats", "variance", jnp.ones, size),
    )
    mean, variance = (moment.value for moment in running)
    if not (deterministic or self.is_initializing()):
      mean, variance = self._batch_moments(x)
      for moment, new in zip(running, (mean, variance), strict=True):
        moment.value = _DECAY * moment.value + (1 - _DECAY) * new
    x = (x - mean) * jax.lax.rsqrt(variance + _EPS)
    return x * scale[None] + bias[None]

  def _batch_moments(self, x: Array) -> tuple[Array, Array]:
    """Mean and variance, each ``[1, D]``, over the examples of all devices."""
    devices = jax.lax.axis_size(self.axis_name) if self.axis_name else 1
    if x.shape[0] * devices < 2:
      raise ValueError(
        "pooled_norm='batch' needs at least 2 examples in training, got 1: it "
        "would be 0, and with it the encoder's gradient."
      )
    mean = jnp.mean(x, axis=0, keepdims=True)
    if devices == 1:
      return mean, jnp.var(x, axis=0, keepdims=True)
    mean = jax.lax.pmean(mean, self.axis_name)
    square = jnp.mean(jnp.square(x - mean), axis=0, keepdims=True)
    return mean, jax.lax.pmean(square, self.axis_name)


def weighted_mean(x: Array, score: Array, mask: Array) -> Array:
  """Mean of ``[B, T, D]`` by softmax of ``[B, T, 1]``; zeros without a mask."""
  keep = mask[:, :, None]
  if not x.shape[1]:
    return jnp.sum(x, axis=1)  # a softmax of nothing has no largest entry
  score = jnp.where(keep, score, jnp.finfo(score.dtype).min)
  weight = jnp.where(keep, nn.softmax(score, axis=1), 0.0)
  return jnp.sum(weight * jnp.where(keep, x, 0.0), axis=1)


def masked_mean(x: Array, mask: Array) -> Array:
  """Mean of ``[B, T, D]`` over the real positions; zeros if there are none."""
  keep = mask[:, :, None]
  total = jnp.sum(jnp.where(keep, x, 0.0), axis=1)
  return total / jnp.maximum(jnp.sum(keep, axis=1), 1).astype(x.dtype)
