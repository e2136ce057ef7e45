"""Blocks of one head of one example, as CPUs take long sequences."""

import functools

import jax
import jax.numpy as jnp
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linear_attention.xla import plan
from tests.linear_attention.helpers import (
  assert_close,
  build_map,
  draw_arrays,
  output_and_gradients,
)

BLOCK = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Heads of 16 positions and more are taken one at a time."""
  jax.clear_caches()
  sizes = plan.SIZES["cpu"]._replace(block=BLOCK, is_per_head=True)
  monkeypatch.setitem(plan.SIZES, "cpu", sizes)
  yield
  jax.clear_caches()


@pytest.mark.parametrize(
  ("length", "size"), [(16, 16), (31, 31), (32, 16), (100, 17)]
)
def test_blocks_are_at_least_of_the_planned_size_and_little_is_padded(
  length, size
):
  sizes = {"num_devices": 1, "platform": "cpu"}
  planned = plan.plan_blocks(length, 6, None, **sizes)
  assert planned[::2] == (size, True)
  assert -length % size < 4
  assert not plan.plan_blocks(BLOCK - 1, 6, None, **sizes).is_per_head
  assert not plan.plan_blocks(length, 6, 7, **sizes).is_per_head


@pytest.mark.parametrize("component", ["posrf", "trigrf", "oprf"])
@pytest.mark.parametrize("length", [48, 100])
@pytest.mark.quick_every(2)
def test_values_and_gradients_equal_the_reference(component, length):
  # The statistics of oprf are each example's and head's own; queries come in
  # groups of two; and there are keys before the first.
  fm, variables = build_map(component)
  arrays = draw_arrays(length, heads=4, batch=3, scale=0.5)
  mask = jax.random.bernoulli(jax.random.key(1), 0.7, (3, length))
  stats = None
  if component == "oprf":
    stats = fm.calibrate(variables, arrays[0][:, :, ::2], arrays[1])
  _, state = sf.spectral_attention(
    *draw_arrays(7, batch=3, scale=0.5),
    feature_map=fm,
    variables=variables,
    stats=stats,
    return_state=True,
  )
  kwargs = {"key_mask": mask, "stats": stats, "state": state}
  actual = output_and_gradients(arrays, fm, variables, **kwargs)
  expected = output_and_gradients(
    arrays, fm, variables, implementation="reference", **kwargs
  )
  # As in test_engine.py: a signed normalizer amplifies rounding.
  assert_close(actual, expected, 2e-2 if component == "trigrf" else 5e-5)


@pytest.mark.parametrize(("queries", "keys"), [(5, 100), (100, 5), (40, 70)])
@pytest.mark.quick_every(3)
def test_each_side_is_cut_by_its_own_length(queries, keys):
  fm, variables = build_map()
  arrays = draw_arrays(queries, keys)
  actual = output_and_gradients(arrays, fm, variables)
  assert_close(
    actual,
    output_and_gradients(arrays, fm, variables, implementation="reference"),
  )


@pytest.mark.parametrize("num_heads", [1, 2], ids=["shared", "own"])
@pytest.mark.quick_every(2)
def test_learnable_parameters_take_gradients_from_every_head(num_heads):
  fm, variables = build_map("oprf", num_heads=num_heads, statistics="learned")
  arrays = draw_arrays(50, batch=3)

  @functools.partial(jax.jit, static_argnames="implementation")
  def grad(params, implementation):
    loss = lambda params: jnp.sum(
      sf.spectral_attention(
        *arrays,
        feature_map=fm,
        variables=variables._replace(params=params),
        implementation=implementation,
      )
      ** 2
    )
    return jax.grad(loss)(params)

  actual = grad(variables.params, "xla")
  assert all(float(jnp.abs(g).min()) > 0 for g in jax.tree.leaves(actual))
  assert_close(actual, grad(variables.params, "reference"), 1e-4)


def test_positions_are_those_of_the_sequence():
  fm = sf.feature_map(
    "cosformer",
    "none",
    num_features=None,
    component_kwargs={"max_length": 100},
  )
  variables = fm.init(jax.random.key(0), head_dim=4)
  arrays = draw_arrays(100)
  actual = output_and_gradients(arrays, fm, variables)
  assert_close(
    actual,
    output_and_gradients(arrays, fm, variables, implementation="reference"),
  )
