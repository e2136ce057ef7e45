"""Weight matrices W: which frequencies a feature map uses.

One file per group of the taxonomy. To add one: a frozen dataclass with `info`
and `draw`, registered by name, in the file of its group (CONTRIBUTING.md).
"""

from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
  draw_blocks,
)
from spectraformer_jax.weight_matrices.geometric import ORF
from spectraformer_jax.weight_matrices.monte_carlo import IID
from spectraformer_jax.weight_matrices.no_rows import NoRows
from spectraformer_jax.weight_matrices.row_laws import RowLaw, get_row_law
from spectraformer_jax.weight_matrices.unit_cube import MM

__all__ = [
  "IID",
  "MM",
  "ORF",
  "WEIGHT_MATRICES",
  "NoRows",
  "RowLaw",
  "WeightMatrix",
  "WeightMatrixInfo",
  "draw_blocks",
  "get_row_law",
  "list_weight_matrices",
]


def list_weight_matrices() -> tuple[str, ...]:
  """Names of all weight matrices, for `sf.feature_map`.

  Example:
    >>> "orf" in list_weight_matrices()
    True
  """
  return WEIGHT_MATRICES.names()
