"""Encoder and pooling: one vector per sequence, for the classifiers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.nn.config import PooledFields
from spectraformer_jax.nn.inputs import (
  Tokens,
  check_length,
  check_tokens,
)
from spectraformer_jax.nn.token_encoder import TokenEncoder
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array

POOLINGS = ("cls", "mean", "attention")
POOLED_NORMS = ("none", "batch")

_DECAY = 0.9  # of BatchNorm's running moments, at each training step
_EPS = 1e-6


class SequenceEncoder(PooledFields):
  """Embeds tokens and positions, encodes them, and pools.

  Attributes:
    vocab_size: number of token ids.
    max_len: longest sequence; size of the table of learned positions.
    pooling: "mean" over the real positions; "cls": a learned token in front of
      the sequence, whose output is taken; "attention": a mean over the real
      positions with weights ``softmax(w . x)``, w learned.
    pooled_norm: "none", or "batch": a `BatchNorm` of the pooled vector.
    batch_axis: the mapped axis over which a batch is divided, if any: see
      `BatchNorm`.
    embed_dim, num_layers, ..., remat: see `EncoderConfig`.

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

  @nn.compact
  def __call__(
    self, tokens: Tokens, length: Array, *, deterministic: bool = True
  ) -> Array:
    """Maps ``[B, T]`` to ``[B, D]`` float32.

    Args:
      tokens: ints, T at most `max_len`.
      length: ``[B]`` ints, the number of real tokens of each row: the rest is
        padding, whose content has no influence.
      deterministic: False in training: applies dropout (which needs an rng
        "dropout") and updates running statistics.

    Raises:
      ValueError: a sequence longer than `max_len`, a token out of the
        vocabulary, or unknown `pooling` or `pooled_norm`.
    """
    check_choice("pooling", self.pooling, POOLINGS)
    check_choice("pooled_norm", self.pooled_norm, POOLED_NORMS)
    tokens = check_tokens(tokens)
    length = check_length(length, tokens)
    mask = checks.positions_before(length, tokens.shape[1])
    encoder = TokenEncoder.from_config(self, prepend_cls=self.pooling == "cls")
    nn.share_scope(self, encoder)
    x = encoder(tokens, mask, deterministic=deterministic)
    x = self._pool(x.astype(jnp.float32), mask)
    if self.pooled_norm == "batch":
      norm = BatchNorm(self.batch_axis, name="pooled_norm")
      x = norm(x, deterministic=deterministic)
    return x

  def _pool(self, x: Array, mask: Array) -> Array:
    """Maps ``[B, T, D]`` to ``[B, D]``."""
    if self.pooling == "cls":
      return x[:, 0]
    if self.pooling == "attention":
      score = nn.Dense(
        1, use_bias=False, param_dtype=self.param_dtype, name="pooling"
      )(x)
      return weighted_mean(x, score, mask)
    return masked_mean(x, mask)


class BatchNorm(nn.Module):
  """Gives each entry of ``[B, D]`` mean 0 and variance 1 over the batch.

  That removes the part that all examples share, which cannot tell them apart,
  and gives the rest the scale that later layers expect (Ioffe and Szegedy,
  "Batch Normalization", 2015). Deterministic calls use running moments, kept in
  the collection "feature_stats". (`flax.linen.BatchNorm` would keep its moments
  in a collection of its own, which checkpoints and training steps would have to
  carry.)

  Attributes:
    axis_name: the axis of `jax.pmap`, `jax.vmap` or `jax.shard_map` over which
      the batch is divided equally: moments are then those of the whole batch.
      None: moments are those of the examples of this call.
  """

  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: Array, *, deterministic: bool = True) -> Array:
    """Maps ``[B, D]`` to ``[B, D]``, float32.

    Raises:
      ValueError: a single example in training, since its entries would all
        become 0.
    """
    shape = (1, x.shape[-1])
    scale = self.param("scale", nn.initializers.ones, shape[1:])
    bias = self.param("bias", nn.initializers.zeros, shape[1:])
    running = (
      self.variable("feature_stats", "mean", jnp.zeros, shape),
      self.variable("feature_stats", "variance", jnp.ones, shape),
    )
    mean, variance = (moment.value for moment in running)
    if not (deterministic or self.is_initializing()):
      mean, variance = self._batch_moments(x)
      for moment, new in zip(running, (mean, variance), strict=True):
        moment.value = _DECAY * moment.value + (1 - _DECAY) * new
    x = (x - mean) * jax.lax.rsqrt(variance + _EPS)
    return x * scale[None] + bias[None]

  def _batch_moments(self, x: Array) -> tuple[Array, Array]:
    """Returns mean and variance, ``[1, D]``, over all devices' examples."""
    devices = jax.lax.axis_size(self.axis_name) if self.axis_name else 1
    if x.shape[0] * devices < 2:
      raise ValueError(
        "pooled_norm='batch' needs at least 2 examples in training, got 1: one "
        "example minus the mean is 0, and so is the encoder's gradient."
      )
    mean = jnp.mean(x, axis=0, keepdims=True)
    if devices == 1:
      return mean, jnp.var(x, axis=0, keepdims=True)
    mean = jax.lax.pmean(mean, self.axis_name)
    square = jnp.mean(jnp.square(x - mean), axis=0, keepdims=True)
    return mean, jax.lax.pmean(square, self.axis_name)


def weighted_mean(x: Array, score: Array, mask: Array) -> Array:
  """Takes the mean of real positions with weights softmax(score).

  Args:
    x: ``[B, T, D]``.
    score: ``[B, T, 1]``.
    mask: ``[B, T]`` bool, True at real positions.

  Returns:
    ``[B, D]``; zeros for a row without a real position.
  """
  mask = mask[:, :, None]
  if not x.shape[1]:
    return jnp.sum(x, axis=1)  # a softmax over no entry is an error
  score = jnp.where(mask, score, jnp.finfo(score.dtype).min)
  weight = jnp.where(mask, nn.softmax(score, axis=1), 0.0)
  return jnp.sum(weight * jnp.where(mask, x, 0.0), axis=1)


def masked_mean(x: Array, mask: Array) -> Array:
  """Takes the mean of real positions.

  Args:
    x: ``[B, T, D]``.
    mask: ``[B, T]`` bool, True at real positions.

  Returns:
    ``[B, D]``; zeros for a row without a real position.
  """
  mask = mask[:, :, None]
  total = jnp.sum(jnp.where(mask, x, 0.0), axis=1)
  return total / jnp.maximum(jnp.sum(mask, axis=1), 1).astype(x.dtype)
