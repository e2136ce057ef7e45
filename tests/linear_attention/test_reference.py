"""The chunked form to read first, against the quadratic and the fast ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linear_attention import reference


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("chunk_size", [1, 6, 24])
def test_chunks_equal_the_engine(implementation, chunk_size):
  rngs = jax.random.split(jax.random.key(0), 4)
  phi, psi = (jax.random.uniform(rng, (24, 6), minval=0.1) for rng in rngs[:2])
  value, weights = (jax.random.normal(rng, (24, 3)) for rng in rngs[2:])

  def engine(*arrays):
    out = sf.linear_attention(
      *(x[None, :, None] for x in arrays),
      is_causal=True,
      chunk_size=chunk_size,
      implementation=implementation,
    )
    return out[0, :, 0]

  def chunked(*arrays):
    return reference.causal_in_chunks(*arrays, chunk_size=chunk_size)

  def values_and_gradients(attend):
    loss = lambda *arrays: jnp.sum(weights * attend(*arrays))
    gradients = jax.grad(loss, (0, 1, 2))(phi, psi, value)
    return attend(phi, psi, value), gradients

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    values_and_gradients(chunked),
    values_and_gradients(engine),
  )
