"""The former place of `spectraformer_jax.study.approximation.capture`."""

import warnings

from spectraformer_jax.study.approximation.capture import (
  capture,
  capture_workdir,
)

__all__ = ["capture", "capture_workdir"]

warnings.warn(
  f"{__name__} is now spectraformer_jax.study.approximation.capture.",
  DeprecationWarning,
  stacklevel=2,
)
