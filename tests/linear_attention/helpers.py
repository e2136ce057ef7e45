"""Maps, inputs and comparisons that tests of the engine share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import spectraformer_jax as sf

CAUSAL = {
  "posrf": {},
  "trigrf": {},
  "oprf": {"statistics": "constant"},
}


@functools.cache
def build_map(component="posrf", num_heads=2, **kwargs):
  """Returns a map with 8 features and its variables, for heads of 4."""
  fm = sf.feature_map(component, "orf", num_features=8, component_kwargs=kwargs)
  return fm, fm.init(jax.random.key(7), head_dim=4, num_heads=num_heads)


def draw_arrays(length, keys=None, heads=2, key_heads=2, batch=2, scale=1.0):
  """Returns random query, key and value with value dim 3."""
  rngs = jax.random.split(jax.random.key(length), 3)
  keys = keys or length
  return (
    scale * jax.random.normal(rngs[0], (batch, length, heads, 4)),
    scale * jax.random.normal(rngs[1], (batch, keys, key_heads, 4)),
    jax.random.normal(rngs[2], (batch, keys, key_heads, 3)),
  )


def output_and_gradients(
  arrays, fm, variables, state=None, is_counted=1.0, **kwargs
):
  """Returns the output, and gradients of query, key, value and the state.

  They are the gradients of a weighted sum of the outputs, in which an output
  counts where `is_counted` (broadcast to it) is 1 and not 0.
  """

  @jax.jit
  def both(arrays, state):
    def loss(arrays, state):
      out = sf.spectral_attention(
        *arrays,
        feature_map=fm,
        variables=variables,
        initial_state=state,
        **kwargs,
      )
      weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
      weights = weights.reshape(out.shape) * is_counted
      return jnp.sum(out.astype(jnp.float32) * weights), out

    if state is None:
      grads, out = jax.grad(loss, has_aux=True)(arrays, None)
      return out, grads
    sums = (state.kv, state.total)
    with_sums = lambda sums: state._replace(kv=sums[0], total=sums[1])
    grads, out = jax.grad(
      lambda arrays, sums: loss(arrays, with_sums(sums)), (0, 1), has_aux=True
    )(arrays, sums)
    return out, grads

  return both(arrays, state)


def assert_close(actual, expected, tolerance=3e-5):
  """Asserts that trees agree up to the order of float32 sums."""
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
