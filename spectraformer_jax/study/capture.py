"""Old name of `spectraformer_jax.study.approximation.capture`."""

from spectraformer_jax.study import moved

moved(__name__, "spectraformer_jax.study.approximation.capture")
