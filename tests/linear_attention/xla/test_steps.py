"""Causal steps of several chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linear_attention.xla import plan, steps
from tests.linear_attention.helpers import (
  CAUSAL,
  assert_close,
  build_map,
  draw_arrays,
  output_and_gradients,
)

CHUNK = 12


@pytest.fixture(params=[(3, 1), (4, 16), (9, 1)], ids=lambda p: f"{p[0]}x")
def chunks_per_step(request, monkeypatch):
  """Sets the chunks of a step of 4 rows, and the steps between saved states."""
  count, num_steps = request.param
  jax.clear_caches()
  length = CHUNK * count
  sizes = plan.Sizes(
    chunk=CHUNK, step=4 * length, stride=num_steps * length, block=2048
  )
  monkeypatch.setitem(plan.SIZES, "cpu", sizes)
  yield count
  jax.clear_caches()


@pytest.mark.parametrize("component", CAUSAL)
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.quick_every(5)
def test_values_and_gradients_equal_the_reference(
  component, heads, chunks_per_step
):
  planned = plan.plan_causal(100, 4, None, is_packed=False, platform="cpu")
  assert planned[:2] == (CHUNK, -(-9 // -(-9 // chunks_per_step)))
  fm, variables = build_map(component, **CAUSAL[component])
  arrays = draw_arrays(100, heads=heads, scale=0.5)
  mask = jax.random.bernoulli(jax.random.key(1), 0.7, (2, 100))
  _, state = sf.spectral_attention(
    *draw_arrays(7, scale=0.5),
    feature_map=fm,
    variables=variables,
    is_causal=True,
    return_state=True,
  )
  kwargs = {"is_causal": True, "key_mask": mask, "state": state}
  actual = output_and_gradients(arrays, fm, variables, **kwargs)
  expected = output_and_gradients(
    arrays, fm, variables, implementation="reference", **kwargs
  )
  # As in test_engine.py: a signed normalizer amplifies rounding.
  assert_close(actual, expected, 2e-2 if component == "trigrf" else 5e-5)


def test_the_future_changes_no_bit(chunks_per_step):
  fm, variables = build_map()
  arrays = draw_arrays(100, scale=3.0)
  other = [a.at[:, 50:].multiply(-7.0) for a in arrays]

  def attend(arrays):
    return sf.spectral_attention(
      *arrays,
      feature_map=fm,
      variables=variables,
      is_causal=True,
    )

  before, after = attend(arrays), attend(other)
  np.testing.assert_array_equal(after[:, :50], before[:, :50])
  assert float(jnp.abs(after - before).max()) > 0.0


def test_the_state_equals_that_of_single_chunks(chunks_per_step):
  fm, variables = build_map()
  kwargs = {"feature_map": fm, "variables": variables, "is_causal": True}

  def after(chunk_size):
    _, state = sf.spectral_attention(
      *draw_arrays(100), return_state=True, chunk_size=chunk_size, **kwargs
    )
    return state._replace(rest=None)  # what rounding left out is not the same

  actual, expected = after(None), after(100)
  assert actual.kv.shape == expected.kv.shape
  assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("count", [2, 16, 19])
def test_sums_of_chunks_one_by_one_equal_those_at_once(count):
  first, own, weight = (
    jax.random.normal(jax.random.key(i), (2, 3, *n, 5, 4))
    for i, n in enumerate([(), (count,), (count,)])
  )

  def sums_and_gradients(running):
    def loss(first, own):
      before, last = running(first, own)
      return jnp.sum(before * weight) + jnp.sum(jnp.sin(last))

    return running(first, own), jax.grad(loss, argnums=(0, 1))(first, own)

  # A sum of 20 normal numbers, each rounded to 6e-8 of it.
  assert_close(
    sums_and_gradients(steps._running_one_by_one),
    sums_and_gradients(steps._running_at_once),
    1e-5,
  )
  before, last = steps._running(first, own)
  np.testing.assert_array_equal(before[:, :, 0], first)
  np.testing.assert_allclose(last, first + own.sum(2), atol=1e-5)
