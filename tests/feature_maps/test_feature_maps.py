"""Unbiasedness of the first pairs, their variances, and redraw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.helpers import PAIRS, estimates, standard_scores

HEAD_DIM = PAIRS.shape[-1]


def calibrate_on_pairs(fm):
  """Returns the stats of the test pairs, or None."""
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  points = [jnp.asarray(PAIRS[None, :, side, None, :]) for side in (0, 1)]
  return fm.calibrate(variables, *points) or None


def kernel_values(fm):
  """Returns the exact kernel of the test pairs."""
  return np.asarray(
    fm.kernel(
      fm.init(jax.random.key(0), head_dim=HEAD_DIM), PAIRS[:, 0], PAIRS[:, 1]
    )
  )


@pytest.mark.parametrize("component", ["trigrf", "posrf", "oprf"])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("matrix", ["iid", "orf"])
@pytest.mark.quick_every(4)
def test_unbiased(component, kernel, matrix):
  fm = sf.feature_map(
    component, matrix, num_features=16, component_kwargs={"kernel": kernel}
  )
  samples = estimates(
    fm, jax.random.key(1), PAIRS, 20_000, stats=calibrate_on_pairs(fm)
  )
  scores = standard_scores(samples, kernel_values(fm))
  assert np.all(np.abs(scores) < 4.0), scores


@pytest.mark.parametrize("component", ["trigrf", "posrf"])
def test_moment_matching_bias_is_that_of_the_formula(component):
  # E of mm is 0F1(; (M-1)/2; -+(M-1) s / 4) in place of exp(-+s/2).
  from scipy.special import hyp0f1

  num_features = 12
  fm = sf.feature_map(component, "mm", num_features=num_features)
  samples = estimates(fm, jax.random.key(2), PAIRS, 40_000)
  x, y = PAIRS[:, 0].astype(np.float64), PAIRS[:, 1].astype(np.float64)
  halves = 0.5 * (np.sum(x**2, -1) + np.sum(y**2, -1))
  order = (num_features - 1) / 2
  if component == "trigrf":
    square = np.sum((x - y) ** 2, -1)
    expected = np.exp(halves) * hyp0f1(order, -order * square / 2)
  else:
    square = np.sum((x + y) ** 2, -1)
    expected = np.exp(-halves) * hyp0f1(order, order * square / 2)
  scores = standard_scores(samples, expected)
  assert np.all(np.abs(scores) < 4.0), scores
  biased = standard_scores(samples, kernel_values(fm))
  assert np.abs(biased).max() > 4.0, "the bias of mm is measurable here"


def test_variances_follow_the_formulas():
  x, y = PAIRS[:, 0], PAIRS[:, 1]
  kernel = np.exp(np.sum(x * y, -1))
  formulas = {
    "trigrf": kernel**2 * (np.cosh(np.sum((x - y) ** 2, -1)) - 1.0),
    "posrf": kernel**2 * (np.exp(np.sum((x + y) ** 2, -1)) - 1.0),
  }
  for component, expected in formulas.items():
    fm = sf.feature_map(component, "iid", num_features=64)
    samples = estimates(fm, jax.random.key(3), PAIRS, 20_000)
    squares = 64 * (samples - kernel) ** 2
    # y = -x makes posrf exact: rounding is all that is left.
    scores = standard_scores(squares, expected)
    assert np.all((np.abs(scores) < 5.0) | (expected < 1e-9)), scores


def test_optimal_a_beats_its_neighbours():
  # Mean over pairs of log E Z^2 as a function of A, in float64.
  fm = sf.feature_map("oprf", "iid", num_features=4)
  rho = float(calibrate_on_pairs(fm)["component"]["rho"][0, 0])
  optimum = (1.0 - 1.0 / rho) / 8.0
  x, y = PAIRS[:, None, 0].astype(float), PAIRS[None, :, 1].astype(float)
  pair_square = np.sum((x + y) ** 2, -1)

  def objective(a):
    ratio = 2.0 * (1.0 - 4.0 * a) / (1.0 - 8.0 * a)
    return np.mean(
      HEAD_DIM * np.log(1.0 - 4.0 * a)
      - HEAD_DIM / 2 * np.log(1.0 - 8.0 * a)
      + ratio * pair_square
    )

  assert optimum < 0.0
  factors = np.exp(np.random.default_rng(0).normal(0.0, 0.5, 100))
  assert all(objective(optimum) <= objective(optimum * f) for f in factors)


def test_oprf_with_a_zero_is_posrf():
  oprf = sf.feature_map("oprf", "orf", num_features=16)
  posrf = sf.feature_map("posrf", "orf", num_features=16)
  variables = oprf.init(jax.random.key(0), head_dim=HEAD_DIM)
  x = jnp.asarray(PAIRS[:, :1])
  stats = {"component": {"rho": jnp.ones((1, 1))}}
  np.testing.assert_allclose(
    oprf.apply(variables, x, side="query", stats=stats),
    posrf.apply(variables, x, side="query"),
    rtol=1e-6,
  )


def test_learned_oprf_starts_at_the_constant_and_trains():
  x = jnp.asarray(PAIRS[:, :1])
  maps = [
    sf.feature_map(
      "oprf", "orf", num_features=16, component_kwargs={"statistics": s}
    )
    for s in ("constant", "learned")
  ]
  constant, learned = (
    fm.init(jax.random.key(0), head_dim=HEAD_DIM) for fm in maps
  )
  np.testing.assert_allclose(
    maps[0].apply(constant, x, side="key"),
    maps[1].apply(learned, x, side="key"),
    rtol=1e-5,
  )
  grads = jax.grad(
    lambda params: (
      maps[1].apply(learned._replace(params=params), x, side="key").sum()
    )
  )(learned.params)
  assert all(float(jnp.abs(g).min()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("matrix", ["iid", "orf", "mm"])
def test_redraw(matrix):
  fm = sf.feature_map("posrf", matrix, num_features=16)
  old = fm.init(jax.random.key(0), head_dim=4, num_heads=3)
  new = jax.jit(fm.redraw)(jax.random.key(1), old)
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, old)
  assert new.params == old.params == {}
  w = new.projection["rows"]["w"]
  assert float(jnp.abs(w - old.projection["rows"]["w"]).max()) > 0.1
  assert float(jnp.abs(w[0] - w[1]).max()) > 0.1, "heads are independent"
  again = fm.redraw(jax.random.key(1), old)
  np.testing.assert_allclose(again.projection["rows"]["w"], w, atol=1e-6)


def test_structure_of_orf_and_mm():
  orf = sf.feature_map("posrf", "orf", num_features=20)
  w = orf.init(jax.random.key(0), head_dim=8).projection["rows"]["w"][0]
  unit = w / jnp.linalg.norm(w, axis=-1, keepdims=True)
  gram = np.asarray(unit @ unit.T)
  for start in (0, 8, 16):
    block = gram[start : start + 8, start : start + 8]
    np.testing.assert_allclose(block, np.eye(len(block)), atol=1e-5)
  assert np.abs(gram[:8, 8:16]).max() > 0.1, "blocks are independent"
  mm = sf.feature_map("posrf", "mm", num_features=20)
  w = mm.init(jax.random.key(0), head_dim=8).projection["rows"]["w"][0]
  np.testing.assert_allclose(w.T @ w / 20, np.eye(8), atol=1e-5)
  np.testing.assert_allclose(w.mean(0), np.zeros(8), atol=1e-6)


def test_equal_builds_are_one_object_and_dtype_is_kept():
  build = lambda: sf.feature_map(
    "oprf", "orf", num_features=8, component_kwargs={"kernel": "gaussian"}
  )
  assert build() is build()
  assert build() is not sf.feature_map("oprf", "orf", num_features=8)
  fm = build()
  variables = fm.init(jax.random.key(0), head_dim=4, dtype=jnp.bfloat16)
  assert variables.projection["rows"]["w"].dtype == jnp.bfloat16
  redrawn = fm.redraw(jax.random.key(1), variables)
  assert redrawn.projection["rows"]["w"].dtype == jnp.bfloat16
