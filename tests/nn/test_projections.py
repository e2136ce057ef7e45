"""Projections: those of flax, values and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax.nn.projections import projection

LAYERS = {
  "to heads": ({"features": (3, 4)}, (2, 5, 6)),
  "from heads": ({"features": 6, "axis": (-2, -1)}, (2, 5, 3, 4)),
  "of no example": ({"features": (3, 4)}, (0, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_same_as_flax(name, dtype):
  kwargs, shape = LAYERS[name]
  x = jax.random.normal(jax.random.key(0), shape)
  theirs = nn.DenseGeneral(**kwargs, dtype=dtype)
  ours = projection(**kwargs, dtype=dtype)
  variables = theirs.init(jax.random.key(1), x)
  # Not zero, as biases are at first.
  variables = jax.tree.map(lambda p: p + 0.1, variables)

  def grads(layer):
    def loss(variables, x):
      out = layer.apply(variables, x)
      return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(grad)(variables, x)

  got, want = grads(ours), grads(theirs)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  # Sums of up to 12 products in another order; bfloat16 keeps 8 bits.
  tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
    )
