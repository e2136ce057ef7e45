"""The former place of `spectraformer_jax.study.approximation.inputs`."""

import warnings

from spectraformer_jax.study.approximation.inputs import (
  Inputs,
  make_inputs,
  write_npz,
)

__all__ = ["Inputs", "make_inputs", "write_npz"]

warnings.warn(
  f"{__name__} is now spectraformer_jax.study.approximation.inputs.",
  DeprecationWarning,
  stacklevel=2,
)
