"""Old name of `spectraformer_jax.study.approximation.inputs`."""

from spectraformer_jax.study import moved

moved(__name__, "spectraformer_jax.study.approximation.inputs")
