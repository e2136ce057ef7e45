"""Gauss-Hermite rows, sampled and on sparse grids."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

import spectraformer_jax as sf
from spectraformer_jax.weight_matrices import GQ, SGQ
from spectraformer_jax.weight_matrices.quadrature import (
  gauss_hermite,
  most_nodes,
  smolyak_grid,
)
from tests.helpers import PAIRS, standard_scores
from tests.weight_matrices.helpers import (
  assert_first_moments,
  directions,
  draw_rows,
  gaussian_means,
  row_estimates,
)


def normal_moment(powers):
  """E prod_j g_j**powers_j for independent standard normals."""
  if any(power % 2 for power in powers):
    return 0.0
  return float(math.prod(math.prod(range(1, power, 2)) for power in powers))


def monomials(dim, degree):
  """Powers of all monomials of `dim` variables up to a total degree."""
  for total in range(degree + 1):
    for axes in itertools.combinations_with_replacement(range(dim), total):
      yield tuple(axes.count(axis) for axis in range(dim))


def discrete_means(z, kind, num_nodes):
  """Means of `row_estimates` for independent entries on Gauss nodes."""
  nodes, weights = gauss_hermite(num_nodes)
  function = {"trig": np.cos, "pos": np.exp}[kind]
  # cos: rows are symmetric, so the product of the cosines' means is all.
  return np.prod(function(z[..., None] * nodes) @ weights, axis=-1)


@pytest.mark.parametrize("num_nodes", [2, 3, 8, 64])
def test_gauss_rule_is_exact_to_degree_2l_minus_1(num_nodes):
  nodes, weights = gauss_hermite(num_nodes)
  assert abs(weights.sum() - 1.0) < 1e-12 and weights.min() > 0.0
  for power in range(min(2 * num_nodes, 24)):
    moment = float(weights @ nodes**power)
    scale = float(weights @ np.abs(nodes) ** power)
    # 1e-10: float64, for terms that cancel.
    assert abs(moment - normal_moment((power,))) < 1e-10 * scale
  if num_nodes < 12:
    power = 2 * num_nodes
    assert weights @ nodes**power < normal_moment((power,)) * (1.0 - 1e-4)


@pytest.mark.parametrize("kind", ["trig", "pos"])
@pytest.mark.parametrize("num_nodes", [2, 3])
def test_sampled_grid_has_the_mean_of_the_product_formula(num_nodes, kind):
  rows, weights = draw_rows(GQ(num_nodes), 24, 8, 4000)
  z = np.sqrt(2.0) * directions(8)
  samples = row_estimates(rows, weights, z, kind)
  scores = standard_scores(samples, discrete_means(z, kind, num_nodes))
  assert np.all(np.abs(scores) < 4.0), scores
  if num_nodes == 2:
    biased = standard_scores(samples, gaussian_means(z, kind))
    assert np.abs(biased).max() > 8.0, "the bias of two nodes is measurable"


def test_biases_of_the_docstring():
  z = np.sqrt(2.0) * directions(8)
  bias = {
    num_nodes: np.abs(
      discrete_means(z, "trig", num_nodes) - gaussian_means(z, "trig")
    ).max()
    for num_nodes in (2, 3, 8)
  }
  assert 0.19 < bias[2] < 0.22
  assert 0.03 < bias[3] < 0.05
  assert bias[8] < 1e-3


def test_sampled_grid_draws_nodes_by_their_weights():
  rows, weights = draw_rows(GQ(3), 24, 8, 4000)
  assert_first_moments(rows, weights)
  nodes, probabilities = gauss_hermite(3)
  which = np.argmin(np.abs(rows[..., None] - nodes), axis=-1)
  np.testing.assert_allclose(rows, nodes[which], atol=1e-6)
  counts = np.bincount(which.ravel(), minlength=3)
  assert chisquare(counts, probabilities * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("growth", ["odd", "linear"])
@pytest.mark.parametrize(
  ("level", "dim"), [(2, 1), (2, 4), (3, 2), (3, 5), (4, 3), (5, 2)]
)
def test_sparse_grid_is_exact_to_degree_2q_minus_1(level, dim, growth):
  nodes, weights = smolyak_grid(level, dim, growth)
  assert len(np.unique(nodes, axis=0)) == len(nodes) <= most_nodes(level, dim)
  errors = {}
  for powers in monomials(dim, 2 * level):
    terms = np.prod(nodes ** np.array(powers), axis=1) * weights
    # 1e-10: float64, for terms that cancel.
    if abs(terms.sum() - normal_moment(powers)) > 1e-10 * np.abs(terms).sum():
      errors[powers] = terms.sum() - normal_moment(powers)
  assert all(sum(powers) == 2 * level for powers in errors), errors
  # With odd rules, the product of q squares is the first to fail.
  assert errors or (growth == "odd" and dim < level)


def test_level_two_is_the_known_rule():
  for growth, radius, weight in (
    ("odd", 3.0**0.5, 1 / 6),
    ("linear", 1.0, 0.5),
  ):
    nodes, weights = smolyak_grid(2, 6, growth)
    assert len(nodes) == 13
    np.testing.assert_array_equal(nodes[0], 0.0)
    assert abs(weights[0] - (1.0 - 12.0 * weight)) < 1e-12
    np.testing.assert_allclose(weights[1:], weight, rtol=1e-12)
    corners = np.concatenate([np.eye(6), -np.eye(6)]) * radius
    order = lambda points: points[np.lexsort(points.T)]
    np.testing.assert_allclose(order(nodes[1:]), order(corners), rtol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 8, 32, 64])
def test_number_of_rows(dim):
  assert SGQ().num_nodes(dim) == 2 * dim + 1
  assert SGQ(level=3).num_nodes(dim) == 2 * dim**2 + 4 * dim + 1


def test_rows_of_a_sparse_grid():
  for level in (2, 3):
    matrix = SGQ(level=level)
    nodes, expected = smolyak_grid(level, 8, "odd")
    rows, weights = draw_rows(matrix, len(expected), 8, 1)
    # 1e-5: stored as float32 logarithms.
    np.testing.assert_allclose(rows[0], nodes, rtol=1e-6)
    np.testing.assert_allclose(weights[0], expected, rtol=1e-5)
    assert (weights < 0).any() and abs(weights.sum() - 1.0) < 1e-3


def test_a_weight_of_zero_is_harmless():
  # At H = 3 the origin counts nothing.
  fm = sf.feature_map("posrf", "sgq", num_features=7)
  variables = fm.init(jax.random.key(0), head_dim=3)
  x = jnp.ones((2, 1, 3))
  for side in ("query", "key"):
    value, grad = jax.value_and_grad(
      lambda x, side=side: fm.apply(variables, x, side=side).sum()
    )(x)
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("component", ["trigrf", "posrf"])
def test_signed_weights_reach_the_estimate(component):
  fm = sf.feature_map(component, "sgq", num_features=9)
  variables = fm.init(jax.random.key(0), head_dim=4)
  query, key = (
    fm.apply(variables, PAIRS[:, side, None, :], side=name)[:, 0]
    for side, name in ((0, "query"), (1, "key"))
  )
  estimates = np.sum(np.asarray(query) * np.asarray(key), axis=-1)
  x, y = PAIRS[:, 0].astype(np.float64), PAIRS[:, 1].astype(np.float64)
  halves = 0.5 * (np.sum(x**2, -1) + np.sum(y**2, -1))
  root = np.sqrt(3.0)
  if component == "trigrf":
    pairs, scale = np.cos(root * (x - y)), np.exp(halves)
  else:
    pairs, scale = np.cosh(root * (x + y)), np.exp(-halves)
  expected = scale * (1.0 - 4.0 / 3.0 + np.sum(pairs, axis=-1) / 3.0)
  np.testing.assert_allclose(estimates, expected, rtol=1e-5)
  assert not fm.info.positive and not fm.info.unbiased
  # Only the query's features carry the sign: sums over keys stay positive.
  if component == "posrf":
    assert (np.asarray(query) < 0).any() and (np.asarray(key) > 0).all()


def test_a_fixed_grid_is_not_redrawn_a_rotated_one_is():
  fixed = sf.feature_map("posrf", "sgq", num_features=9)
  variables = fixed.init(jax.random.key(0), head_dim=4, num_heads=2)
  with pytest.raises(ValueError, match="'sgq' cannot be redrawn"):
    fixed.redraw(jax.random.key(1), variables)
  rotated = sf.feature_map(
    "posrf", "sgq", num_features=9, weight_matrix_kwargs={"rotate": True}
  )
  old = rotated.init(jax.random.key(0), head_dim=4)
  new = rotated.redraw(jax.random.key(1), old)
  before, after = (v.projection["rows"]["w"][0] for v in (old, new))
  assert np.abs(before - after).max() > 0.1
  np.testing.assert_allclose(before @ before.T, after @ after.T, atol=1e-5)


def test_errors_state_the_right_number():
  fm = sf.feature_map("posrf", "sgq", num_features=64)
  with pytest.raises(ValueError, match="got num_features=64.*num_features=65"):
    fm.init(jax.random.key(0), head_dim=32)
  fm = sf.feature_map(
    "posrf", "sgq", num_features=64, weight_matrix_kwargs={"level": 3}
  )
  with pytest.raises(ValueError, match="use num_features=2177"):
    fm.init(jax.random.key(0), head_dim=32)
  with pytest.raises(ValueError, match="level=5 at head_dim=64.*lower level"):
    SGQ(level=5).num_nodes(64)


def test_errors_of_options():
  with pytest.raises(ValueError, match="level must be an integer >= 2, got 1"):
    SGQ(level=1)
  with pytest.raises(ValueError, match="growth must be one of"):
    SGQ(growth="even")
  for num_nodes in (1, 65):
    with pytest.raises(
      ValueError, match="num_nodes must be an integer from 2 to 64"
    ):
      GQ(num_nodes=num_nodes)
  with pytest.raises(
    ValueError, match="num_nodes must be an integer from 2 to 64"
  ):
    GQ(num_nodes=2.0)
