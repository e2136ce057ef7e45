"""Dropout from a quarter of the random bits that Flax's dropout takes.

Works around the cost of `jax.random.bernoulli` on a CPU: for each entry,
threefry computes two words of 32 bits, of which one is used. That takes a third
of a small model's training step. Here an entry takes 16 bits, and both words
are used. Remove this module once ``python benchmarks/train_step.py`` takes the
same time with `flax.linen.Dropout`. Drawing 16 bits per entry multiplied the
step's time by 0.86; using both words, together with `projections`, multiplied
it by another 0.92.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry2x32_p

from spectraformer_jax.nn.by_token import SAVED
from spectraformer_jax.typing import Array

_LEVELS = 1 << 16
# From this rate on, rates are rounded to 1.
MAX_RATE = 1.0 - 0.5 / _LEVELS


class Dropout(nn.Module):
  """Does what `flax.linen.Dropout` does, from 16 random bits for each entry.

  The rate is rounded to a multiple of 2^-16, and entries that stay are divided
  by 1 minus the rounded rate, so that the mean is exact.

  Attributes:
    rate: share of the entries that become zero; in [0, 1), before and after
      rounding.

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
    """Maps ``[..., D]`` to ``[..., D]``.

    Needs an rng "dropout" unless deterministic.

    Raises:
      ValueError: a rate outside [0, 1), before or after rounding.
    """
    if not 0.0 <= self.rate < MAX_RATE:
      raise ValueError(
        "dropout rate must be in [0, 1) when rounded to a multiple of 2**-16, "
        f"got {self.rate!r}."
      )
    kept_levels = round((1.0 - self.rate) * _LEVELS)
    if deterministic or kept_levels == _LEVELS:
      return x
    # A pair of words gives four numbers of 16 bits. They are compared before
    # they are concatenated, so that the backward pass stores booleans.
    *outer, length, width = (1, *x.shape)  # x may have a single axis
    words = _pairs_of_words(
      self.make_rng("dropout"), (*outer, -(-length // 4), width)
    )
    halves = [h for word in words for h in (word & (_LEVELS - 1), word >> 16)]
    keep = jnp.concatenate([half < kept_levels for half in halves], axis=-2)
    keep = keep[..., :length, :].reshape(x.shape)
    keep = checkpoint_name(keep, SAVED)
    return jnp.where(keep, x * (_LEVELS / kept_levels), 0.0)


def _pairs_of_words(rng: Array, shape: tuple[int, ...]) -> list[Array]:
  """Draws two arrays of random uint32.

  With threefry, an entry depends on the key and its own position alone.
  """
  if jax.random.key_impl(rng) != "threefry2x32":
    return list(jax.random.bits(rng, (2, *shape), jnp.uint32))
  position = sum(
    math.prod(shape[axis + 1 :])
    * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for axis in range(len(shape))
  )
  zero = jnp.zeros_like(position)
  return threefry2x32_p.bind(*jax.random.key_data(rng), zero, position)
