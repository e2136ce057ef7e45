"""Readers of files that users bring; `spectraformer_jax.data` imports them."""
