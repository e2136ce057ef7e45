"""Independent rows, alone or with their opposites."""

import dataclasses

import jax
import jax.numpy as jnp

from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.building_blocks import antithetic_rows
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


@WEIGHT_MATRICES.register("antithetic")
@dataclasses.dataclass(frozen=True)
class Antithetic(WeightMatrix):
  r"""Independent Gaussian rows, each beside its opposite.

  .. math::
    W = (G; -G), \quad G_{mj} \sim N(0, 1)

  The first half is independent; an odd M drops the last opposite. Each row is
  N(0, I). The variance against independent rows is exactly
  :math:`1 - e^{-|x + y|^2}` for positive maps, and exactly 2 for trigonometric
  ones (a cosine is even, so half of the rows are wasted).

  References:
    Antithetic variates (Hammersley and Morton, 1956) on Rahimi and Recht, 2007.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "antithetic", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> bool((w[:4] == -w[4:]).all())
    True
  """

  info = WeightMatrixInfo(
    name="antithetic",
    group="monte carlo",
    marginals="exact",
    source="antithetic variates on Rahimi and Recht 2007",
    summary="independent rows and their opposites",
    good_for="positive maps at small |x + y|; never maps with both signs of a "
    "row (trigonometric, hyperbolic), which lose half of the rows",
    antithetic=True,
    constraint="any num_features (even preferred), any head_dim",
    cost="M H / 2 draws",
    variance="trig 2, pos 1 - exp(-|x+y|^2)",
  )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    half = jax.random.normal(
      rng, (-(-num_rows // 2), head_dim), dtype=jnp.float32
    )
    return {"w": antithetic_rows(half, num_rows)}
