"""Independent rows."""

import dataclasses

from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.row_laws import ENTRY_LAWS


@WEIGHT_MATRICES.register("iid")
@dataclasses.dataclass(frozen=True)
class IID(WeightMatrix):
  """Independent rows of the component's law: plain Monte Carlo.

  Unbiased for every component. One row's variance divided by M is the
  denominator of every ratio quoted for other matrices.

  References:
    Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007,
    Algorithm 1.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "iid", num_features=8)
    >>> fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"].shape
    (1, 8, 4)
  """

  info = WeightMatrixInfo(
    name="iid",
    group="monte carlo",
    marginals="exact",
    source="Rahimi and Recht 2007, Algorithm 1",
    summary="independent rows",
    good_for="a baseline for every component; any row law",
    row_laws=ENTRY_LAWS,
    cost="M H draws",
    variance="1 (the reference)",
  )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    return {"w": law.sample(rng, (num_rows, head_dim))}
