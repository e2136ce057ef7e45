"""Uniforms stored as integers, for laws whose parameter comes from data.

An entry under the Poisson, geometric or hash law is an integer b of 23 bits,
which stands for the uniform u = (b + 1/2) / 2**23; the component inverts the
cdf once it knows the parameter of the law. Integers keep all their bits when a
projection is stored in bfloat16 (they are stored as float32); a uniform rounded
to bfloat16 would follow another law.
"""

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array

NUM_BITS = 23


def draw(rng: Array, shape: tuple[int, ...]) -> Array:
  """Draws independent integers of 23 random bits, int32 in [0, 2**23)."""
  bits = jax.random.bits(rng, shape, jnp.uint32)
  return (bits >> (32 - NUM_BITS)).astype(jnp.int32)


def from_uniform(uniform: Array) -> Array:
  """Returns the integers b, int32, for float32 uniforms in (0, 1)."""
  return jnp.floor(uniform * 2.0**NUM_BITS).astype(jnp.int32)


def to_uniform(bits: Array) -> Array:
  """Returns float32 uniforms u strictly inside (0, 1); u and 1 - u are exact.

  Args:
    bits: b from `draw` or `from_uniform`, in any dtype that holds 23 bits.

  Example:
    >>> float(to_uniform(from_uniform(0.75)))
    0.7500000596046448
  """
  return (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-NUM_BITS)
