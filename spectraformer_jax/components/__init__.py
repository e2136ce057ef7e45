"""Component functions f: which nonlinearity a feature map applies to W x.

One file per family of the taxonomy. To add one: a frozen dataclass with
`info`, `log_features` and `kernel_value`, registered by name (CONTRIBUTING.md).
"""

from spectraformer_jax.components.base import (
  COMPONENTS,
  Component,
  ComponentInfo,
  ComponentState,
  KernelComponent,
)
from spectraformer_jax.components.data_dependent import DataDependent
from spectraformer_jax.components.optimal import OPRF
from spectraformer_jax.components.positive import PosRF
from spectraformer_jax.components.trigonometric import TrigRF

__all__ = [
  "COMPONENTS",
  "OPRF",
  "Component",
  "ComponentInfo",
  "ComponentState",
  "DataDependent",
  "KernelComponent",
  "PosRF",
  "TrigRF",
  "list_components",
]


def list_components() -> tuple[str, ...]:
  """Names of all component functions, for `sf.feature_map`.

  Example:
    >>> "oprf" in list_components()
    True
  """
  return COMPONENTS.names()
