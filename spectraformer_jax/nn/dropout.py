"""Dropout on a quarter of the random bits."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry2x32_p

from spectraformer_jax.nn.by_token import KEPT
from spectraformer_jax.typing import Array

_LEVELS = 1 << 16
# Rates from here on are rounded to 1.
MAX_RATE = 1.0 - 0.5 / _LEVELS


class Dropout(nn.Module):
  """As `flax.linen.Dropout`, with a quarter of its random numbers.

  Drawing them would be a third of a small model's training step on a CPU: an
  entry has 16 random bits instead of 32, and of threefry's two words both are
  used. The rate is rounded to a multiple of 2^-16, and what is kept is scaled
  by the rounded one, so that the mean stays exact.

  Attributes:
    rate: share of the entries that become zero, in [0, 1), also when it is
      rounded.

  Example:
    >>> x = jnp.ones((4, 6))
    >>> layer = Dropout(0.5)
    >>> rngs = {"dropout": jax.random.key(0)}
    >>> out = layer.apply({}, x, deterministic=False, rngs=rngs)
    >>> sorted(set(out.ravel().tolist()))
    [0.0, 2.0]
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array, *, deterministic: bool) -> Array:
    """``[..., D] -> [..., D]``; needs rng "dropout" unless deterministic.

    Raises:
      ValueError: a rate that is, or is rounded to, a number outside [0, 1).
    """
    if not 0.0 <= self.rate < MAX_RATE:
      raise ValueError(
        "dropout rate must be in [0, 1) when rounded to a multiple of 2**-16, "
        f"got {self.rate!r}."
      )
    kept = round((1.0 - self.rate) * _LEVELS)
    if deterministic or kept == _LEVELS:
      return x
    rng = self.make_rng("dropout")
    # Four numbers of 16 bits from each pair of words. Compared before they are
    # put in a column, so that the backward pass stores booleans.
    *outer, length, width = (1, *x.shape)
    words = _pairs_of_words(rng, (*outer, -(-length // 4), width))
    halves = [h for word in words for h in (word & (_LEVELS - 1), word >> 16)]
    keep = jnp.concatenate([half < kept for half in halves], axis=-2)
    keep = keep[..., :length, :].reshape(x.shape)
    keep = checkpoint_name(keep, KEPT)
    return jnp.where(keep, x * (_LEVELS / kept), 0.0)


def _pairs_of_words(rng: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
  """Two arrays of random uint32; each entry from its position alone."""
  if jax.random.key_impl(rng) != "threefry2x32":
    return tuple(jax.random.bits(rng, (2, *shape), jnp.uint32))
  position = sum(
    math.prod(shape[axis + 1 :])
    * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for axis in range(len(shape))
  )
  zero = jnp.zeros_like(position)
  return threefry2x32_p.bind(*jax.random.key_data(rng), zero, position)
