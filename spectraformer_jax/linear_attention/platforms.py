"""The platform that a program is made for, which decides its sizes."""

import jax

# A context in which programs are traced for another platform than JAX runs on:
# `with for_platform("tpu"): jax.jit(f).lower(x).compile()`. JAX traces a
# function again if the context has changed.
for_platform = jax.make_user_context(None)


def current_platform() -> str:
  """Returns "cpu", "gpu" or "tpu": as `for_platform` says, or JAX's own."""
  return for_platform.value or jax.default_backend()
