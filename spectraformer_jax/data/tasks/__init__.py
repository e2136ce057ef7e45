"""The tasks, one module each; `spectraformer_jax.data` imports all of them."""
