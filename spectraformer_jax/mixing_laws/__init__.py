"""Isotropic kernels as mixtures of Gaussian kernels; `laws` has one class each.

To add a kernel, write a class in `laws` and register its name: components and
`exact_attention` find it in `LAWS`.
"""

from spectraformer_jax.mixing_laws.cap import LARGEST_TAU, capped_log_kernel
from spectraformer_jax.mixing_laws.laws import (
  LAWS,
  ExpPower,
  GeneralisedCauchy,
  Kummer,
  Laplacian,
  Matern,
  MixingLaw,
  RationalQuadratic,
  build_law,
)

__all__ = [
  "LARGEST_TAU",
  "LAWS",
  "ExpPower",
  "GeneralisedCauchy",
  "Kummer",
  "Laplacian",
  "Matern",
  "MixingLaw",
  "RationalQuadratic",
  "build_law",
  "capped_log_kernel",
]
