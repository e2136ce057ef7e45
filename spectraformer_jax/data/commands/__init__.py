"""The commands of ``python -m spectraformer_jax.data``."""
