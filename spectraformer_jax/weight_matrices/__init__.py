"""Weight matrices W: recipes for the frequencies (rows) of a feature map.

In formulas M is num_features (the number of rows), H is head_dim, and x and y
are a query and a key, scaled by ``head_dim ** -1/4``.

Each file has one construction or several similar ones. A new weight matrix is a
frozen dataclass with `info` and `draw`, registered by name and imported here:
see CONTRIBUTING.md.
"""

from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  GaussianRows,
  NormedRows,
  WeightMatrix,
  WeightMatrixInfo,
  draw_blocks,
)
from spectraformer_jax.weight_matrices.fastfood import (
  FastFood,
  FastFoodLearnable,
)
from spectraformer_jax.weight_matrices.free import Free
from spectraformer_jax.weight_matrices.geometric import (
  ORF,
  ORFAntithetic,
  ORFPairedNorms,
  ORFStratifiedNorms,
)
from spectraformer_jax.weight_matrices.gmm import GMM, Cov, Variational
from spectraformer_jax.weight_matrices.hadamard import ROM, SORF, ROMHybrid
from spectraformer_jax.weight_matrices.learners import Learner
from spectraformer_jax.weight_matrices.monte_carlo import (
  IID,
  Antithetic,
  Importance,
  Sparse,
)
from spectraformer_jax.weight_matrices.networks import Flow, Generator
from spectraformer_jax.weight_matrices.no_rows import NoRows
from spectraformer_jax.weight_matrices.qmc import (
  QMC,
  QMCHalton,
  QMCLattice,
  QMCSobol,
)
from spectraformer_jax.weight_matrices.quadrature import GQ, SGQ
from spectraformer_jax.weight_matrices.repelling import NOMC, SimRF, SimRFPlus
from spectraformer_jax.weight_matrices.rotations import Butterfly, LearnedORF
from spectraformer_jax.weight_matrices.row_laws import RowLaw, get_row_law
from spectraformer_jax.weight_matrices.spherical_radial import (
  SROMC,
  SSR,
  SSRPos,
)
from spectraformer_jax.weight_matrices.spherical_structured import SSF
from spectraformer_jax.weight_matrices.splines import BBQ, LearnedRadial
from spectraformer_jax.weight_matrices.structural import (
  SCRF,
  PModel,
  PModelCirculant,
  PModelHankel,
  PModelLDR,
  PModelToeplitz,
)
from spectraformer_jax.weight_matrices.unit_cube import LHS, MM, MMAnti, MMChi

__all__ = [
  "BBQ",
  "GMM",
  "GQ",
  "IID",
  "LHS",
  "MM",
  "NOMC",
  "ORF",
  "QMC",
  "ROM",
  "SCRF",
  "SGQ",
  "SORF",
  "SROMC",
  "SSF",
  "SSR",
  "WEIGHT_MATRICES",
  "Antithetic",
  "Butterfly",
  "Cov",
  "FastFood",
  "FastFoodLearnable",
  "Flow",
  "Free",
  "GaussianRows",
  "Generator",
  "Importance",
  "LearnedORF",
  "LearnedRadial",
  "Learner",
  "MMAnti",
  "MMChi",
  "NoRows",
  "NormedRows",
  "ORFAntithetic",
  "ORFPairedNorms",
  "ORFStratifiedNorms",
  "PModel",
  "PModelCirculant",
  "PModelHankel",
  "PModelLDR",
  "PModelToeplitz",
  "QMCHalton",
  "QMCLattice",
  "QMCSobol",
  "ROMHybrid",
  "RowLaw",
  "SSRPos",
  "SimRF",
  "SimRFPlus",
  "Sparse",
  "Variational",
  "WeightMatrix",
  "WeightMatrixInfo",
  "draw_blocks",
  "get_row_law",
  "list_weight_matrices",
]


def list_weight_matrices() -> tuple[str, ...]:
  """Returns the names of all weight matrices, for `sf.feature_map`.

  Example:
    >>> "orf" in list_weight_matrices()
    True
  """
  return WEIGHT_MATRICES.names()
