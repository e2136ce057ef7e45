"""Every component of the softmax or Gaussian kernel has exact keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.components import COMPONENTS
from tests.helpers import smallest_map
from tests.hybrid_attention.helpers import assert_close, definition, draw, hide

LENGTH = 11
KERNELS = {
  name: getattr(COMPONENTS.build(name), "kernel", None)
  for name in sf.list_components()
}
WITH_KERNEL = [name for name, kernel in KERNELS.items() if kernel]
MASK = hide(LENGTH, [3, 9])


@functools.cache
def build(name):
  """Returns the component's smallest map on a matrix that fits."""
  matrices = [
    matrix for other, matrix in sf.list_feature_maps() if other == name
  ]
  matrix = "orf" if "orf" in matrices else matrices[0]
  fm = smallest_map(name, matrix, head_dim=4)
  rng = jax.random.key(1)
  return {"feature_map": fm, "variables": fm.init(rng, head_dim=4, num_heads=2)}


def check(maps, case):
  """Checks output and padding, and that gradients are finite."""
  arrays = draw(LENGTH, scale=0.7)
  fm, variables = maps["feature_map"], maps["variables"]
  query, key = (x * 4**-0.25 for x in arrays[:2])
  stats = fm.calibrate(variables, query, key, key_mask=MASK)
  case = {"key_mask": MASK, "stats": stats or None, **case}

  @jax.jit
  def run(params, arrays):
    def loss(params, arrays):
      out = sf.spectral_attention(
        *arrays,
        feature_map=fm,
        variables=variables._replace(params=params),
        chunk_size=4,
        **case,
      )
      return jnp.sum(jnp.sin(out)), out

    return jax.grad(loss, (0, 1), has_aux=True)(params, arrays)

  grads, out = run(variables.params, arrays)
  # Discrete maps sum many logarithms in float32.
  assert_close(out, definition(arrays, **maps, **case), 1e-4)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert all(np.asarray(grad).any() for grad in grads[1])
  query, *others = arrays
  shown = MASK[:, :, None, None]
  dirty = (query, *(jnp.where(shown, x, jnp.nan) for x in others))
  dirty_grads, dirty_out = run(variables.params, dirty)
  np.testing.assert_array_equal(dirty_out, out)
  for got, want in zip(
    *map(jax.tree.leaves, (dirty_grads, grads)), strict=True
  ):
    np.testing.assert_array_equal(got, want)


def test_components_of_every_kind_have_a_kernel():
  assert {"posrf", "asderf", "trigrf", "poisrf"} <= set(WITH_KERNEL)
  assert set(KERNELS.values()) == {None, "softmax"}


@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.quick_every(40)
def test_both_ways(name):
  check(build(name), {"window": 2, "num_sinks": 1, "num_heavy": 2})


@pytest.mark.parametrize("name", WITH_KERNEL)
@pytest.mark.quick_every(60)
def test_causal(name):
  check(build(name), {"window": 2, "num_sinks": 1, "is_causal": True})


@pytest.mark.parametrize(
  "name", [name for name, kernel in KERNELS.items() if kernel is None]
)
def test_others_are_refused(name):
  with pytest.raises(
    ValueError, match=f"component '{name}' estimates a kernel"
  ):
    sf.spectral_attention(*draw(4), **build(name), window=1)


@pytest.mark.parametrize("kernel", ["gaussian", "softmax"])
@pytest.mark.quick_every(2)
def test_centred_inputs(kernel):
  options = {"centred": True, "kernel": kernel}
  fm = sf.feature_map("posrf", "orf", num_features=8, component_kwargs=options)
  variables = fm.init(jax.random.key(1), head_dim=4, num_heads=2)
  case = {"window": 2, "num_sinks": 1, "num_heavy": 2}
  check({"feature_map": fm, "variables": variables}, case)
