"""No weight matrix, for components that use none."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.typing import Array, Params, Projection, WeightSample
from spectraformer_jax.weight_matrices import base
from spectraformer_jax.weight_matrices.row_laws import RowLaw


@base.WEIGHT_MATRICES.register("none")
@dataclasses.dataclass(frozen=True)
class NoRows(base.WeightMatrix):
  """No rows, for components without W, such as ELU+1 and "prototypes".

  A component whose number of features is a multiple of M takes num_features;
  any other takes num_features=None.

  References:
    None. The name "none" in a pair says that the pair has no random rows.

  Example:
    >>> import spectraformer_jax as sf
    >>> sf.feature_map("elu1", "none", num_features=None).info.name
    'elu1-none'
    >>> sf.feature_map("prototypes", "none", num_features=64).feature_dim
    64
  """

  info = base.WeightMatrixInfo(
    name="none",
    group="none",
    marginals="exact",
    source="-",
    summary="no rows",
    good_for="components without W",
    row_laws=("none",),
    constraint="num_features=None where F is no multiple of M",
    cost="nothing",
  )

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    return {}

  @override
  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    return WeightSample(jnp.zeros((0, 0), jnp.float32))
