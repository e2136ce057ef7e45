"""Row laws: the distributions that components require of the entries of W.

The entries of a row are independent under every law. A weight matrix that
spreads its rows evenly ("lhs", "qmc") draws dependent uniforms and calls
`RowLaw.from_uniform`. One that only makes Gaussian rows (orthogonal,
structured, learnt) does not list other laws in `WeightMatrixInfo.row_laws`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices import stored_uniforms
from spectraformer_jax.weight_matrices.pieces import normal


@dataclasses.dataclass(frozen=True)
class RowLaw:
  """Distribution of the entries of a row.

  Attributes:
    name: `ComponentInfo.row_law` of the components that require it.
    sample: draws independent entries: ``(rng, shape) -> float32``, or int32 for
      the laws of `stored_uniforms`.
    from_uniform: inverse cdf of one entry: maps uniforms in (0, 1) to the dtype
      of `sample`.
  """

  name: str
  sample: Callable[[Array, tuple[int, ...]], Array]
  from_uniform: Callable[[Array], Array]


def open_uniform(rng: Array, shape: tuple[int, ...]) -> Array:
  """Draws float32 uniforms strictly inside (0, 1), where `ndtri` is finite."""
  return bits_to_open_uniform(jax.random.bits(rng, shape, jnp.uint32))


def bits_to_open_uniform(bits: Array) -> Array:
  """Maps uint32 to (0, 1) by its upper 23 bits, without rounding."""
  return stored_uniforms.to_uniform(bits >> (32 - stored_uniforms.NUM_BITS))


def _no_rows(*_: object) -> Array:
  """Returns an empty array, for components without rows."""
  return jnp.zeros((0,), jnp.float32)


ROW_LAWS = {
  law.name: law
  for law in (
    RowLaw("gaussian", normal, ndtri),
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


# Laws for a weight matrix that makes each entry by `sample` or `from_uniform`.
ENTRY_LAWS = tuple(name for name in ROW_LAWS if name != "none")


def get_row_law(name: str) -> RowLaw:
  """Returns the row law called `name`.

  Args:
    name: a key of `ROW_LAWS`.

  Raises:
    ValueError: unknown `name`; the message suggests the nearest one.
  """
  check_choice("row law", name, ROW_LAWS)
  return ROW_LAWS[name]
