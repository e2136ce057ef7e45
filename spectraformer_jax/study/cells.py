"""The former place of `spectraformer_jax.study.sweep`."""

import warnings

from spectraformer_jax.study.sweep import Sweep

__all__ = ["Sweep"]

warnings.warn(
  f"{__name__} is now spectraformer_jax.study.sweep.",
  DeprecationWarning,
  stacklevel=2,
)
