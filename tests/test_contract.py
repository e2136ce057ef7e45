"""Every component, every weight matrix and every pair keeps the contract.

All of it is driven by the registries: a new entry is tested without being
listed here. Only what is common to all is here; formulas have their own tests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax import testing
from spectraformer_jax.components import COMPONENTS
from spectraformer_jax.feature_maps.compose import mismatch
from spectraformer_jax.kernels import KERNELS
from spectraformer_jax.weight_matrices import WEIGHT_MATRICES

# Pairs that waste half of their rows warn when they are built.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.* has the variance:UserWarning"
)

PAIRS = sf.list_feature_maps()
ALL_COMPONENTS, ALL_MATRICES = sf.list_components(), sf.list_weight_matrices()

BATCH, HEADS, HEAD_DIM, VALUE_DIM = 2, 2, 4, 3
QUERIES, KEYS, VISIBLE = 5, 6, 4
SCALES = (0.0, 1e-3, 1.0, 10.0, 30.0)


@pytest.fixture(autouse=True, scope="module")
def share_programs():
  """Caches all programs on disk, and frees them after this file.

  Pairs share most programs, which are otherwise too small to be cached.
  Thousands of programs in memory at once would crash the process.
  """
  update = jax.config.update
  seconds = jax.config.jax_persistent_cache_min_compile_time_secs
  update("jax_persistent_cache_min_compile_time_secs", 0.0)
  yield
  update("jax_persistent_cache_min_compile_time_secs", seconds)
  masked_run.cache_clear()
  jax.clear_caches()


def smallest_pair(component, matrix):
  """Builds the pair with as few features as it accepts."""
  num_features = testing.smallest_num_features(
    component, matrix, head_dim=HEAD_DIM
  )
  return sf.compose(component, matrix, num_features=num_features)


def build(component_name, matrix_name):
  """Builds the pair of these names with default options."""
  return smallest_pair(
    COMPONENTS.build(component_name), WEIGHT_MATRICES.build(matrix_name)
  )


def usual_matrix(component_name):
  """Returns "orf" if it fits, else the first matrix that does."""
  fitting = [matrix for name, matrix in PAIRS if name == component_name]
  return "orf" if "orf" in fitting else fitting[0]


def usual_component(matrix_name):
  """Returns "posrf" or "trigrf" if they fit, else the first that does."""
  fitting = [name for name, matrix in PAIRS if matrix == matrix_name]
  return next((n for n in ("posrf", "trigrf") if n in fitting), fitting[0])


def draw_inputs(seed, num_queries, num_keys, batch=BATCH):
  """Draws query, key and value."""
  rngs = jax.random.split(jax.random.key(seed), 3)
  shapes = (
    (batch, num_queries, HEADS, HEAD_DIM),
    (batch, num_keys, HEADS, HEAD_DIM),
    (batch, num_keys, HEADS, VALUE_DIM),
  )
  return [
    jax.random.normal(rng, shape)
    for rng, shape in zip(rngs, shapes, strict=True)
  ]


def forward_backward(feature_map, variables, query, key, value, **kwargs):
  """Returns the output, and gradients for params, query, key and value."""

  def loss(params, query, key, value):
    out = sf.spectral_attention(
      query,
      key,
      value,
      feature_map=feature_map,
      variables=variables._replace(params=params),
      **kwargs,
    )
    # Of each position, so that a shorter sequence has the same ones.
    indices = jnp.meshgrid(*map(jnp.arange, out.shape), indexing="ij")
    weights = jnp.cos(1.0 + sum((i + 1.0) * x for i, x in enumerate(indices)))
    return jnp.sum(weights * out.astype(jnp.float32)), out

  grads, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
    variables.params, query, key, value
  )
  return out, grads


def all_finite(tree):
  return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ALL_COMPONENTS)
@pytest.mark.quick_every(14)
def test_component_contract(name):
  component = COMPONENTS.build(name)
  assert component.info.name == name
  assert COMPONENTS.get(name).__doc__
  testing.check_component(component)


@pytest.mark.parametrize("name", ALL_MATRICES)
@pytest.mark.quick_every(20)
def test_weight_matrix_contract(name):
  matrix = WEIGHT_MATRICES.build(name)
  assert matrix.info.name == name
  assert WEIGHT_MATRICES.get(name).__doc__
  testing.check_weight_matrix(matrix)


def covering_pairs(per_entry=3):
  """Returns pairs that cover each matrix and component `per_entry` times."""
  chosen = set()
  for side, names in ((1, ALL_MATRICES), (0, ALL_COMPONENTS)):
    for index, name in enumerate(names):
      fitting = [pair for pair in PAIRS if pair[side] == name]
      missing = per_entry - sum(pair in chosen for pair in fitting)
      # Rotating, so that neighbours in the list meet different partners.
      start = index * per_entry % len(fitting)
      rest = [
        pair for pair in fitting[start:] + fitting[:start] if pair not in chosen
      ]
      chosen.update(rest[: max(missing, 0)])
  return sorted(chosen)


def check_pair(component_name, matrix_name):
  """Checks that values and gradients are finite and causality holds."""
  feature_map = build(component_name, matrix_name)
  component = feature_map.component
  init = functools.partial(feature_map.init, head_dim=HEAD_DIM, num_heads=HEADS)
  variables = jax.jit(init)(jax.random.key(0))
  inputs = draw_inputs(1, 3, 3, batch=1)
  stats = None
  if feature_map.info.needs_stats:
    stats = jax.jit(feature_map.calibrate)(variables, *inputs[:2])
  is_causal = component.info.causal_safe

  @jax.jit
  def run(variables, query, key, value, stats):
    run = functools.partial(
      forward_backward, feature_map, variables, query, key, value
    )
    causal = run(is_causal=True, stats=stats) if is_causal else ()
    return run(), causal

  both, causal = run(variables, *inputs, stats)
  assert both[0].shape == inputs[2].shape
  assert all_finite(both), "bidirectional"
  assert all_finite(causal), "causal"
  if not is_causal:
    with pytest.raises(ValueError, match="causal"):
      forward_backward(feature_map, variables, *inputs, is_causal=True)
    return
  changed = [x.at[:, -1].multiply(-3.0) for x in inputs]
  _, after = run(variables, *changed, stats)
  before, after = causal[0], after[0]
  # Rounding alone: maxima over the sequence shift the exponents.
  np.testing.assert_allclose(
    before[:, :-1], after[:, :-1], atol=1e-5, rtol=1e-3
  )
  assert not np.allclose(before[:, -1], after[:, -1], atol=1e-3)


@pytest.mark.parametrize(("component", "matrix"), covering_pairs())
@pytest.mark.quick_every(40)
def test_pair_attends(component, matrix):
  check_pair(component, matrix)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_COMPONENTS)
def test_every_pair_attends(name):
  wrong = {}
  for component, matrix in PAIRS:
    if component == name:
      try:
        check_pair(component, matrix)
      except Exception as error:  # All pairs are reported, not the first.
        wrong[f"{component}-{matrix}"] = f"{type(error).__name__}: {error}"
  jax.clear_caches()
  assert wrong == {}


def test_every_pair_builds():
  for component, matrix in PAIRS:
    feature_map = build(component, matrix)
    assert feature_map.info.name == f"{component}-{matrix}"
    assert feature_map is build(component, matrix)


@pytest.mark.parametrize(
  "name",
  [name for name in ALL_COMPONENTS if COMPONENTS.build(name).needs_stats],
)
@pytest.mark.quick_every(4)
def test_causal_needs_statistics_of_the_past(name):
  feature_map = build(name, usual_matrix(name))
  variables = feature_map.init(jax.random.key(0), head_dim=HEAD_DIM)
  inputs = draw_inputs(1, 3, 3, batch=1)
  with pytest.raises(ValueError, match="'learned' or 'constant'.*'ema'"):
    sf.spectral_attention(
      *inputs, feature_map=feature_map, variables=variables, is_causal=True
    )


def test_other_pairs_are_refused_with_the_reason():
  # No pair is left out: it is listed, or refused at build time.
  for name in ALL_COMPONENTS:
    for matrix_name in ALL_MATRICES:
      if (name, matrix_name) in PAIRS:
        continue
      reason = mismatch(
        COMPONENTS.build(name), WEIGHT_MATRICES.build(matrix_name)
      )
      assert repr(name) in reason and repr(matrix_name) in reason
      with pytest.raises(ValueError) as refused:
        sf.feature_map(name, matrix_name, num_features=8)
      assert str(refused.value) == reason


def test_every_entry_is_in_a_pair():
  assert {name for name, _ in PAIRS} == set(ALL_COMPONENTS)
  assert {matrix for _, matrix in PAIRS} == set(ALL_MATRICES)


@functools.cache
def masked_run(feature_map, dtype):
  """Returns a jitted call with masks, which many tests share."""
  variables = feature_map.init(
    jax.random.key(0), head_dim=HEAD_DIM, num_heads=HEADS
  )

  @jax.jit
  def run(query, key, value, query_mask, key_mask):
    inputs = (x.astype(dtype) for x in (query, key, value))
    return forward_backward(
      feature_map,
      variables,
      *inputs,
      query_mask=query_mask,
      key_mask=key_mask,
    )

  return run


def masks(num_queries=QUERIES, num_keys=KEYS, visible=None):
  """Returns masks [B, T] and [B, S], True at the first `visible` positions."""
  return [
    jnp.broadcast_to(jnp.arange(length)[None, :] < (visible or length), shape)
    for length, shape in (
      (num_queries, (BATCH, num_queries)),
      (num_keys, (BATCH, num_keys)),
    )
  ]


def check_scales(feature_map, dtypes=(jnp.float32, jnp.bfloat16)):
  """Checks values and gradients for NaN at every scale."""
  query, key, value = draw_inputs(1, QUERIES, KEYS)
  for dtype in dtypes:
    for scale in SCALES:
      out, grads = masked_run(feature_map, dtype)(
        scale * query, scale * key, value, *masks()
      )
      hint = f"{feature_map.component}, {jnp.dtype(dtype)}, scale {scale}"
      assert out.dtype == dtype, hint
      assert all_finite(out), f"{hint}: output"
      assert all_finite(grads), f"{hint}: gradients"


def variants(component):
  """Yields the component with one of its common options changed."""
  choices = {
    "kernel": tuple(KERNELS),
    "statistics": ("batch", "constant", "ema", "learned"),
  }
  for field in dataclasses.fields(component):
    current = getattr(component, field.name)
    if isinstance(current, bool):
      yield dataclasses.replace(component, **{field.name: not current})
    for choice in choices.get(field.name, ()):
      if choice != current:
        yield dataclasses.replace(component, **{field.name: choice})


@pytest.mark.parametrize("name", ALL_COMPONENTS)
@pytest.mark.quick_every(10)
def test_no_nan_at_any_scale(name):
  check_scales(build(name, usual_matrix(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_COMPONENTS)
def test_no_nan_at_any_scale_with_options(name):
  matrix = WEIGHT_MATRICES.build(usual_matrix(name))
  for component in variants(COMPONENTS.build(name)):
    check_scales(smallest_pair(component, matrix))


@pytest.mark.parametrize("name", ALL_COMPONENTS)
@pytest.mark.quick_every(5)
def test_padding_never_reaches_outputs(name):
  run = masked_run(build(name, usual_matrix(name)), jnp.float32)
  inputs = draw_inputs(1, QUERIES, KEYS)
  shown = masks(visible=VISIBLE)
  out, grads = run(*inputs, *shown)
  assert (out[:, VISIBLE:] == 0.0).all()
  for junk in (jnp.nan, 1e30, -1e30):
    dirty = [
      jnp.where(jnp.arange(x.shape[1])[None, :, None, None] < VISIBLE, x, junk)
      for x in inputs
    ]
    dirty_out, dirty_grads = run(*dirty, *shown)
    np.testing.assert_array_equal(dirty_out, out)
    for dirty_grad, grad in zip(dirty_grads, grads, strict=True):
      np.testing.assert_equal(
        jax.tree.map(np.asarray, dirty_grad), jax.tree.map(np.asarray, grad)
      )


@pytest.mark.parametrize("name", ALL_COMPONENTS)
@pytest.mark.quick_every(5)
def test_padding_equals_slicing(name):
  feature_map = build(name, usual_matrix(name))
  run = masked_run(feature_map, jnp.float32)
  inputs = draw_inputs(1, QUERIES, KEYS)
  padded, padded_grads = run(*inputs, *masks(visible=VISIBLE))
  sliced, sliced_grads = run(
    *(x[:, :VISIBLE] for x in inputs), *masks(VISIBLE, VISIBLE)
  )
  # float32 sums of other lengths: a few roundings of values of size one.
  np.testing.assert_allclose(padded[:, :VISIBLE], sliced, atol=1e-5, rtol=1e-5)
  for grad, expected in zip(padded_grads[1:], sliced_grads[1:], strict=True):
    assert (grad[:, VISIBLE:] == 0.0).all()
    np.testing.assert_allclose(
      grad[:, :VISIBLE], expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ALL_COMPONENTS)
@pytest.mark.quick_every(10)
def test_examples_do_not_depend_on_their_neighbours(name):
  run = masked_run(build(name, usual_matrix(name)), jnp.float32)
  inputs = draw_inputs(1, QUERIES, KEYS)
  out, _ = run(*inputs, *masks())
  changed, _ = run(*(x.at[1].multiply(-7.0) for x in inputs), *masks())
  np.testing.assert_array_equal(changed[0], out[0])
  assert not np.allclose(changed[1], out[1])


@pytest.mark.parametrize("name", ALL_COMPONENTS)
@pytest.mark.quick_every(10)
def test_queries_that_see_no_key_give_zeros(name):
  run = masked_run(build(name, usual_matrix(name)), jnp.float32)
  inputs = draw_inputs(1, QUERIES, KEYS)
  query_mask, key_mask = masks()
  out, grads = run(*inputs, query_mask, key_mask.at[1].set(False))
  assert (out[1] == 0.0).all()
  assert all_finite((out, grads))
  for grad in grads[1:]:
    assert (grad[1] == 0.0).all()
  full, _ = run(*inputs, query_mask, key_mask)
  np.testing.assert_array_equal(out[0], full[0])
