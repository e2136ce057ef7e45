"""Uniforms kept as integers, until the law they are drawn for is known.

Rows of a law whose parameter comes from data (Poisson, geometric), and hashes,
are stored as the 23 bits b of a uniform u = (b + 1/2) / 2**23. Integers keep
all their bits when a projection is stored in bfloat16; a rounded uniform would
follow another law.
"""

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array

NUM_BITS = 23


def draw(rng: Array, shape: tuple[int, ...]) -> Array:
  """Independent bits, int32 in [0, 2**23)."""
  bits = jax.random.bits(rng, shape, jnp.uint32)
  return (bits >> (32 - NUM_BITS)).astype(jnp.int32)


def from_uniform(uniform: Array) -> Array:
  """The bits, int32, of float32 uniforms in (0, 1)."""
  return jnp.floor(uniform * 2.0**NUM_BITS).astype(jnp.int32)


def to_uniform(bits: Array) -> Array:
  """float32 uniforms strictly inside (0, 1), exact, and so is 1 - u.

  Args:
    bits: from `draw` or `from_uniform`, any dtype that holds 23 bits.

  Example:
    >>> from spectraformer_jax import stored_uniforms
    >>> float(stored_uniforms.to_uniform(stored_uniforms.from_uniform(0.75)))
    0.7500000596046448
  """
  return (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-NUM_BITS)
