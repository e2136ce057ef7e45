"""Component functions f: the nonlinearity that a feature map applies to W x.

One file per family of the taxonomy. To add one, register by name a frozen
dataclass with `info`, `log_features` and `kernel_value` (see CONTRIBUTING.md).
"""

from spectraformer_jax.components.arc_cosine import ArcCosine, ReLU
from spectraformer_jax.components.base import (
  COMPONENTS,
  Component,
  ComponentInfo,
  KernelComponent,
)
from spectraformer_jax.components.centred import Centred, build_component
from spectraformer_jax.components.data_dependent import DataDependent
from spectraformer_jax.components.dense import SADERF
from spectraformer_jax.components.dense_rotated import ADERF, ASDERF, SDERF
from spectraformer_jax.components.deterministic import (
  DPFP,
  ELU1,
  CosFormer,
  Taylor2,
)
from spectraformer_jax.components.discrete import GeomRF, PoisRF
from spectraformer_jax.components.discrete_plus import GeomRFPlus, PoisRFPlus
from spectraformer_jax.components.feature_networks import T2R, Hedgehog
from spectraformer_jax.components.gerf import GERF
from spectraformer_jax.components.hybrid import HRF
from spectraformer_jax.components.isotropic import IsotropicTrig
from spectraformer_jax.components.learnt import Learnt
from spectraformer_jax.components.maclaurin import Maclaurin
from spectraformer_jax.components.optimal import OPRF, OPRFHyperbolic
from spectraformer_jax.components.positive import PosRF, PosRFHyperbolic
from spectraformer_jax.components.prototypes import LearnedExp, Prototypes
from spectraformer_jax.components.rebased import ReBased
from spectraformer_jax.components.rfa import RFA
from spectraformer_jax.components.tensor_sketch import TensorSketch
from spectraformer_jax.components.trigonometric import TrigRF
from spectraformer_jax.typing import ComponentState

__all__ = [
  "ADERF",
  "ASDERF",
  "COMPONENTS",
  "DPFP",
  "ELU1",
  "GERF",
  "HRF",
  "OPRF",
  "RFA",
  "SADERF",
  "SDERF",
  "T2R",
  "ArcCosine",
  "Centred",
  "Component",
  "ComponentInfo",
  "ComponentState",
  "CosFormer",
  "DataDependent",
  "GeomRF",
  "GeomRFPlus",
  "IsotropicTrig",
  "Hedgehog",
  "KernelComponent",
  "LearnedExp",
  "Learnt",
  "Maclaurin",
  "OPRFHyperbolic",
  "PoisRF",
  "PoisRFPlus",
  "PosRF",
  "PosRFHyperbolic",
  "Prototypes",
  "ReBased",
  "ReLU",
  "Taylor2",
  "TensorSketch",
  "TrigRF",
  "build_component",
  "list_components",
]


def list_components() -> tuple[str, ...]:
  """Returns the names of all components, for `sf.feature_map`.

  Example:
    >>> "oprf" in list_components()
    True
  """
  return COMPONENTS.names()
