"""Random Maclaurin features and TensorSketch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax.components.maclaurin import (
  log_coefficients,
  log_degree_law,
)
from tests.components.helpers import (
  HEAD_DIM,
  PAIRS,
  build,
  check_mean_and_square,
  draw_estimates,
  first_head_state,
  zero_safe_scores,
)


@pytest.mark.parametrize("coefficients", ["exp", "inverse", "log"])
@pytest.mark.parametrize("degrees", ["geometric", "poisson"])
@pytest.mark.quick_every(6)
def test_maclaurin_mean_and_square(coefficients, degrees):
  rate = {"rate": 0.8} if degrees == "poisson" else {}
  fm = build(
    "maclaurin",
    coefficients=coefficients,
    degrees=degrees,
    max_degree=5,
    **rate,
  )
  check_mean_and_square(fm, 20_000)


@pytest.mark.parametrize("matrix", ["lhs", "qmc"])
@pytest.mark.quick_every(2)
def test_maclaurin_multiplies_independent_draws_of_coupled_rows(matrix):
  # Both balance two rows of one draw so that one is minus the other: products
  # of them would be biased.
  fm = build("maclaurin", matrix, num_features=1, max_degree=2)
  check_mean_and_square(fm, 20_000, squares=False)


def test_laws_and_coefficients():
  for rate in (None, 0.7, 5.0):
    law = np.exp(log_degree_law(rate, 6))
    np.testing.assert_allclose(law.sum(), 1.0)
    ratio = law[1:] / law[:-1]
    expected = 0.5 if rate is None else rate / np.arange(1, 7)
    np.testing.assert_allclose(ratio, expected * np.ones(6))
  series = {
    "exp": [1, 1, 1 / 2, 1 / 6, 1 / 24],
    "inverse": [1, 1, 1, 1, 1],
    "log": [1, 1, 1 / 2, 1 / 3, 1 / 4],
  }
  for name, expected in series.items():
    np.testing.assert_allclose(np.exp(log_coefficients(name, 4)), expected)


def test_degrees_follow_their_law():
  fm = build("maclaurin", num_features=20_000, degrees="poisson", rate=1.5)
  projection = fm.init(jax.random.key(0), head_dim=1).projection
  degree = np.asarray(projection["component"]["degree"][0], int)
  counts = np.bincount(degree, minlength=9) / 20_000
  law = np.exp(log_degree_law(1.5, 8))
  deviation = np.sqrt(law * (1 - law) / 20_000)
  assert np.all(np.abs(counts - law) < 4 * deviation + 1e-4)


@pytest.mark.parametrize(
  ("coefficients", "full"),
  [
    ("exp", np.exp),
    ("inverse", lambda t: 1 / (1 - t)),
    ("log", lambda t: 1 - np.log(1 - t)),
  ],
)
def test_truncation_is_the_tail_of_the_series(coefficients, full):
  component = build(
    "maclaurin", coefficients=coefficients, max_degree=6, radius=0.8
  ).component
  x, y = (PAIRS[:, side].astype(np.float64) for side in (0, 1))
  inside = lambda z: z / np.sqrt(1 + np.sum(z**2, -1, keepdims=True) / 0.64)
  t = np.sum(inside(x) * inside(y), axis=-1)
  n = np.arange(7, 60)[:, None]
  a = {
    "exp": [1 / math.factorial(k) for k in range(7, 60)],
    "inverse": np.ones(53),
    "log": 1 / n[:, 0],
  }[coefficients]
  tail = np.sum(np.asarray(a)[:, None] * t**n, axis=0)
  value = component.kernel_value(PAIRS[:, 0], PAIRS[:, 1], None)
  np.testing.assert_allclose(value, full(t) - tail, rtol=1e-6)


def test_the_ball_keeps_series_that_need_it_convergent():
  component = build("maclaurin", coefficients="inverse").component
  x = jnp.array([[100.0, 0.0], [1e-3, 0.0]])
  value = component.kernel_value(x, x, None)
  t = np.array([0.85**2, 1e-6])
  np.testing.assert_allclose(value, sum(t**n for n in range(9)), rtol=1e-3)
  # The exponential takes its inputs as they are.
  plain = build("maclaurin", max_degree=24).component
  score = jnp.array([[2.0, 1.0]])
  np.testing.assert_allclose(
    plain.kernel_value(score, score, None), np.exp(5.0), rtol=1e-5
  )


@pytest.mark.slow
def test_poisson_degrees_of_the_best_rate_beat_others_and_geometric_ones():
  x, y = (jnp.asarray(2.0 * PAIRS[2, side]) for side in (0, 1))
  product = float(jnp.sum((x * y) ** 2))
  v = float(jnp.sum(x**2) * jnp.sum(y**2) + 2 * jnp.sum(x * y) ** 2)
  root = math.sqrt(v - 2 * product)

  def moment(**kwargs):
    component = build("maclaurin", max_degree=24, **kwargs).component
    return float(
      component.log_second_moment(x, y, first_head_state(build("relu")))
    )

  best = moment(degrees="poisson", rate=root)
  np.testing.assert_allclose(best, 2 * root, rtol=1e-4)
  factors = np.exp(np.random.default_rng(0).normal(0.0, 0.4, 100))
  for factor in factors:
    assert best < moment(degrees="poisson", rate=root * float(factor)) + 1e-5
  assert best < moment() - 0.1


@pytest.mark.slow
def test_maclaurin_gradient_at_zero_is_that_of_the_linear_term():
  fm = build("maclaurin", num_features=4000)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  y = jnp.asarray(PAIRS[0, 1])
  psi = fm.apply(variables, y[None, None], side="key")[0, 0]
  gradient = jax.grad(
    lambda x: jnp.sum(fm.apply(variables, x, side="query")[0, 0] * psi)
  )(jnp.zeros((1, 1, HEAD_DIM)))
  # 4000 draws of y + noise of deviation |y| * 2: 0.017 each.
  np.testing.assert_allclose(gradient[0, 0], y, atol=0.08)


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("num_features", [7, 16])
@pytest.mark.quick_every(4)
def test_tensorsketch_is_unbiased(degree, num_features):
  fm = build("tensorsketch", num_features=num_features, degree=degree)
  check_mean_and_square(fm, 20_000, squares=False)


def test_tensorsketch_hashes_are_independent_draws():
  # Sobol points of one draw share their last bits, which are the signs.
  fm = build("tensorsketch", "qmc", num_features=8, degree=2)
  check_mean_and_square(fm, 10_000, squares=False)


def test_tensorsketch_is_the_sketch_of_the_tensor():
  # Against the hash of every coordinate of x (x) x (x) x, in float64.
  fm = build("tensorsketch", num_features=8, degree=3)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  bits = np.asarray(variables.projection["rows"]["w"][0]).astype(np.int64)
  sign, bucket = 1 - 2 * (bits & 1), (bits >> 1) * 8 >> 22
  x = PAIRS[2, 0].astype(np.float64)
  expected = np.zeros(8)
  for index in np.ndindex(4, 4, 4):
    place = sum(bucket[j, i] for j, i in enumerate(index)) % 8
    expected[place] += math.prod(sign[j, i] * x[i] for j, i in enumerate(index))
  phi = fm.apply(variables, jnp.asarray(PAIRS[2, :1, None]), side="key")[0, 0]
  np.testing.assert_allclose(phi, expected, atol=1e-6)


def test_tensorsketch_variance_falls_with_the_buckets():
  variances = [
    draw_estimates(build("tensorsketch", num_features=b), 4000)[:, 2].var()
    for b in (8, 64)
  ]
  # Eight times the buckets: an eighth of the variance, within 10 %.
  assert 6.5 < variances[0] / variances[1] < 9.5


def test_hashes_are_uniform():
  fm = build("tensorsketch", num_features=5)
  rngs = jax.random.key(0)
  variables = fm.init(rngs, head_dim=4000, num_heads=2)
  rows = fm.prepare(variables).rows.w.reshape(2, 2, 5, 4000)
  np.testing.assert_array_equal(jnp.sum(jnp.abs(rows), axis=2), 1.0)
  buckets = jnp.mean(jnp.abs(rows), axis=-1)
  # Deviation of a mean of 4000: 0.0063.
  np.testing.assert_allclose(buckets, 0.2, atol=0.026)
  np.testing.assert_allclose(jnp.mean(jnp.sum(rows, 2), -1), 0.0, atol=0.064)


def test_scores_notice_a_wrong_kernel():
  fm = build("maclaurin", max_degree=3)
  samples = draw_estimates(fm, 20_000)
  wrong = np.exp(np.sum(PAIRS[:, 0] * PAIRS[:, 1], -1)) + 0.2
  assert np.abs(zero_safe_scores(samples, wrong)).max() > 4.0


@pytest.mark.parametrize(
  ("name", "matrix", "kwargs", "words"),
  [
    ("maclaurin", "iid", {"coefficients": "ex"}, "Did you mean 'exp'"),
    ("maclaurin", "iid", {"degrees": "poison"}, "Did you mean 'poisson'"),
    ("maclaurin", "iid", {"max_degree": 0}, "must be an integer from 1 to 24"),
    ("maclaurin", "iid", {"max_degree": 25}, "from 1 to 24, got 25"),
    ("maclaurin", "iid", {"rate": 1.0}, "rate=1.0 is for degrees='poisson'"),
    (
      "maclaurin",
      "iid",
      {"degrees": "poisson", "rate": -1.0},
      "rate must be positive",
    ),
    ("maclaurin", "iid", {"radius": 1.0}, r"radius must be in \(0, 1\)"),
    ("maclaurin", "orf", {}, "needs rows of law 'rademacher'"),
    ("tensorsketch", "iid", {"degree": 9}, "from 1 to 8, got 9"),
    ("tensorsketch", "iid", {"degree": 0}, "degree must be an integer from 1"),
    ("tensorsketch", "orf", {}, "needs rows of law 'hash'"),
  ],
)
def test_errors(name, matrix, kwargs, words):
  with pytest.raises(ValueError, match=words):
    build(name, matrix, **kwargs)
