"""No weight matrix, for components that use none."""

import dataclasses

import jax.numpy as jnp

from spectraformer_jax.typing import WeightSample
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)


@WEIGHT_MATRICES.register("none")
@dataclasses.dataclass(frozen=True)
class NoRows(WeightMatrix):
  """No rows, for deterministic components such as ELU+1.

  References:
    None: it says in a pair's name that nothing is random.

  Example:
    >>> import spectraformer_jax as sf
    >>> sf.feature_map("elu1", "none", num_features=None).info.name
    'elu1-none'
  """

  info = WeightMatrixInfo(
    name="none",
    group="none",
    marginals="exact",
    source="-",
    summary="no rows",
    good_for="components without W",
    row_laws=("none",),
    constraint="num_features=None",
    cost="nothing",
  )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del rng, num_rows, head_dim, law
    return {}

  def rows(self, params, projection, context=()):
    """See `WeightMatrix.rows`."""
    del params, projection, context
    return WeightSample(jnp.zeros((0, 0), jnp.float32))
