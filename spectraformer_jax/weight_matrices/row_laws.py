"""Laws of the rows that components ask for and weight matrices realise.

A law is a distribution of one entry; entries of a row are independent under
it. A matrix that couples rows works on uniforms and calls `from_uniform`; one
that only makes Gaussian rows (orthogonal, structured, learned) refuses others.
A law whose parameter comes from data (Poisson, geometric), and a hash, is
stored as the bits of uniforms (`stored_uniforms`): the component inverts the
cdf once it knows the parameter.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices import stored_uniforms


@dataclasses.dataclass(frozen=True)
class RowLaw:
  """Distribution of the entries of a row.

  Attributes:
    name: what components ask for.
    sample: ``(rng, shape) -> float32`` (stored uniforms: int32), independent
      entries.
    from_uniform: entrywise inverse cdf, ``(0, 1) -> float32`` (or int32).
  """

  name: str
  sample: Callable[[Array, tuple[int, ...]], Array]
  from_uniform: Callable[[Array], Array]


def open_uniform(rng: Array, shape: tuple[int, ...]) -> Array:
  """Uniforms strictly inside (0, 1), exact in float32: no infinite normals."""
  bits = jax.random.bits(rng, shape, jnp.uint32)
  return bits_to_open_uniform(bits)


def bits_to_open_uniform(bits: Array) -> Array:
  """Maps uint32 to (0, 1): 23 bits and a half, both exact in float32."""
  return ((bits >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-23)


def _no_rows(*_):
  """A component without rows asks for none."""
  return jnp.zeros((0,), jnp.float32)


ROW_LAWS = {
  law.name: law
  for law in (
    RowLaw(
      "gaussian",
      lambda rng, shape: jax.random.normal(rng, shape, dtype=jnp.float32),
      ndtri,
    ),
    RowLaw("uniform", open_uniform, lambda u: u),
    RowLaw(
      "rademacher",
      lambda rng, shape: jax.random.rademacher(rng, shape, jnp.float32),
      lambda u: jnp.where(u < 0.5, -1.0, 1.0).astype(jnp.float32),
    ),
    *(
      RowLaw(name, stored_uniforms.draw, stored_uniforms.from_uniform)
      for name in ("poisson", "geometric", "hash")
    ),
    RowLaw("none", _no_rows, _no_rows),
  )
}


# What a matrix can realise that draws, or inverts, entry by entry.
ENTRY_LAWS = tuple(name for name in ROW_LAWS if name != "none")


def get_row_law(name: str) -> RowLaw:
  """The law called `name`; ValueError with the nearest name if none."""
  if name not in ROW_LAWS:
    raise ValueError(f"Unknown row law {name!r}.{nearest(name, ROW_LAWS)}")
  return ROW_LAWS[name]
