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
from spectraformer_jax.weight_matrices.bbq import BBQ
from spectraformer_jax.weight_matrices.butterfly import Butterfly
from spectraformer_jax.weight_matrices.coupled_norms import (
  ORFPairedNorms,
  ORFStratifiedNorms,
)
from spectraformer_jax.weight_matrices.fastfood import FastFood
from spectraformer_jax.weight_matrices.fastfood_learnable import (
  FastFoodLearnable,
)
from spectraformer_jax.weight_matrices.flow import Flow
from spectraformer_jax.weight_matrices.generator import Generator
from spectraformer_jax.weight_matrices.geometric import ORF, ORFAntithetic
from spectraformer_jax.weight_matrices.gmm import GMM, Cov
from spectraformer_jax.weight_matrices.hadamard import ROM, SORF, ROMHybrid
from spectraformer_jax.weight_matrices.importance import Importance
from spectraformer_jax.weight_matrices.latin_hypercube import LHS
from spectraformer_jax.weight_matrices.learned_geometric import (
  LearnedORF,
  LearnedRadial,
)
from spectraformer_jax.weight_matrices.learners import Learner
from spectraformer_jax.weight_matrices.monte_carlo import IID, Antithetic
from spectraformer_jax.weight_matrices.near_orthogonal import NOMC
from spectraformer_jax.weight_matrices.no_rows import NoRows
from spectraformer_jax.weight_matrices.p_model import (
  PModel,
  PModelCirculant,
  PModelHankel,
  PModelLDR,
  PModelToeplitz,
)
from spectraformer_jax.weight_matrices.qmc import (
  QMC,
  QMCHalton,
  QMCLattice,
  QMCSobol,
)
from spectraformer_jax.weight_matrices.quadrature import GQ, SGQ
from spectraformer_jax.weight_matrices.row_laws import RowLaw, get_row_law
from spectraformer_jax.weight_matrices.simplex import SimRF, SimRFPlus
from spectraformer_jax.weight_matrices.sparse import Sparse
from spectraformer_jax.weight_matrices.spherical_radial import (
  SROMC,
  SSR,
  SSRPos,
)
from spectraformer_jax.weight_matrices.spherical_structured import SSF
from spectraformer_jax.weight_matrices.structural import SCRF
from spectraformer_jax.weight_matrices.unit_cube import MM, MMAnti, MMChi
from spectraformer_jax.weight_matrices.variational import Variational

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
  "Generator",
  "Importance",
  "LearnedORF",
  "LearnedRadial",
  "Learner",
  "MMAnti",
  "MMChi",
  "NoRows",
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
  """Names of all weight matrices, for `sf.feature_map`.

  Example:
    >>> "orf" in list_weight_matrices()
    True
  """
  return WEIGHT_MATRICES.names()
