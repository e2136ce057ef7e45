"""Weighted rows on random spheres."""

import jax
import numpy as np
import pytest
from scipy.special import gammaln, hyp0f1, hyp1f1

import spectraformer_jax as sf
from spectraformer_jax.weight_matrices import SROMC, SSR, SSRPos
from spectraformer_jax.weight_matrices.spherical_radial import gauss_laguerre
from tests.helpers import PAIRS, estimates, standard_scores
from tests.weight_matrices.helpers import (
  assert_first_moments,
  directions,
  draw_rows,
  gaussian_means,
  row_estimates,
)

# Complete blocks at H = 8, and a truncated one: (symmetric, M).
COMPLETE = [(False, 1 + 3 * 9), (True, 1 + 2 * 18)]
TRUNCATED = [(False, 24)]


@pytest.mark.parametrize(("symmetric", "num_rows"), [*COMPLETE, *TRUNCATED])
@pytest.mark.parametrize("kind", ["trig", "pos"])
def test_weighted_rows_are_unbiased(symmetric, num_rows, kind):
  rows, weights = draw_rows(SSR(symmetric), num_rows, 8, 4000)
  z = np.sqrt(2.0) * directions(8)
  samples = row_estimates(rows, weights, z, kind)
  scores = standard_scores(samples, gaussian_means(z, kind))
  assert np.all(np.abs(scores) < 4.0), scores
  assert_first_moments(rows, weights)


@pytest.mark.parametrize(
  ("component", "kernel"), [("trigrf", "gaussian"), ("posrf", "softmax")]
)
def test_feature_maps_are_unbiased_with_signed_weights(component, kernel):
  fm = sf.feature_map(
    component, "ssr", num_features=12, component_kwargs={"kernel": kernel}
  )
  samples = estimates(fm, jax.random.key(1), PAIRS, 4000)
  variables = fm.init(jax.random.key(0), head_dim=4)
  expected = np.asarray(fm.kernel(variables, PAIRS[:, 0], PAIRS[:, 1]))
  scores = standard_scores(samples, expected)
  assert np.all(np.abs(scores) < 4.0), scores
  assert fm.info.unbiased and not fm.info.positive


@pytest.mark.parametrize(("symmetric", "num_rows"), COMPLETE)
def test_complete_blocks_are_exact_in_each_draw(symmetric, num_rows):
  rows, weights = draw_rows(SSR(symmetric), num_rows, 8, 4000)
  rows, weights = rows[:50], weights[:50]
  # 1e-4: float32 rounding of weights of either sign and rows of norm 3.
  np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-4)
  first = np.einsum("rm,rmi->ri", weights, rows)
  second = np.einsum("rm,rmi,rmj->rij", weights, rows, rows)
  third = np.einsum("rm,rmi,rmj,rmk->rijk", weights, rows, rows, rows)
  np.testing.assert_allclose(
    second, np.broadcast_to(np.eye(8), second.shape), atol=1e-4
  )
  if symmetric:
    np.testing.assert_allclose(first, 0.0, atol=1e-4)
    np.testing.assert_allclose(third, 0.0, atol=1e-4)
  else:
    assert np.abs(third).max() > 0.1, "degree 3 takes the negatives"


def test_structure_of_the_nodes():
  rows, weights = draw_rows(SSR(), COMPLETE[0][1], 8, 4000)
  np.testing.assert_array_equal(rows[:, 0], 0.0)
  block = rows[:, 1:10]
  norms = np.linalg.norm(block, axis=2)
  np.testing.assert_allclose(norms, norms[:, :1].repeat(9, 1), rtol=1e-5)
  unit = block / norms[..., None]
  gram = unit @ unit.transpose(0, 2, 1)
  expected = np.broadcast_to((9.0 * np.eye(9) - 1.0) / 8.0, gram.shape)
  np.testing.assert_allclose(gram, expected, atol=1e-5)
  np.testing.assert_allclose(weights[:, 1:10], 8 / (27 * norms**2), rtol=1e-4)
  # About half of the draws: the origin's weight has mean 0.
  assert 0.3 < np.mean(weights[:, 0] < 0.0) < 0.7
  assert (weights[:, 1:] > 0.0).all()
  pairs, _ = draw_rows(SSR(symmetric=True), COMPLETE[1][1], 8, 4000)
  np.testing.assert_array_equal(pairs[:, 2::2], -pairs[:, 1::2])


@pytest.mark.parametrize("symmetric", [False, True])
def test_positive_variant(symmetric):
  num_rows, num_blocks = 90, 5 if symmetric else 10
  rows, weights = draw_rows(SSRPos(symmetric), num_rows, 8, 4000)
  assert (weights > 0.0).all()
  np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-5)
  ratio = weights * np.sum(rows**2, axis=2)
  np.testing.assert_allclose(ratio, ratio[:, :1].repeat(num_rows, 1), rtol=1e-3)
  z = np.sqrt(2.0) * directions(8)
  for kind in ("trig", "pos"):
    expected = gaussian_means(z, kind)
    samples = row_estimates(rows, weights, z, kind)
    error = samples.std(axis=0) / np.sqrt(len(samples))
    bias = samples.mean(axis=0) - expected
    # That of a ratio of means over blocks, to first order: the next order is
    # smaller by about the variance of a block's weight, 1/3, over their number.
    half = -1.0 if kind == "trig" else 1.0
    first_order = -8.0 / 6.0 / num_blocks * (hyp1f1(3.0, 4.0, half) - expected)
    slack = np.abs(first_order) * 2.0 / num_blocks + 4.0 * error
    assert np.all(np.abs(bias - first_order) < slack), (bias, first_order)
    assert np.all(np.abs(bias) > 4.0 * error), "the bias is measurable here"
  fm = sf.feature_map("posrf", "ssr_pos", num_features=8)
  assert fm.info.positive and not fm.info.unbiased


@pytest.mark.parametrize("dim", [1, 8, 64])
@pytest.mark.parametrize("num_nodes", [1, 2, 5, 16])
def test_radial_rule_is_exact_to_degree_2l_minus_1(num_nodes, dim):
  nodes, weights = gauss_laguerre(num_nodes, dim)
  assert weights.min() > 0.0 and nodes.min() > 0.0
  for power in range(2 * num_nodes):
    # Moments of the Gamma law of shape dim / 2.
    expected = np.exp(gammaln(dim / 2 + power) - gammaln(dim / 2))
    np.testing.assert_allclose(weights @ nodes**power, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["trig", "pos"])
@pytest.mark.parametrize("num_radii", [2, 3])
def test_radial_orthogonal_rows_have_the_mean_of_the_formula(num_radii, kind):
  matrix = SROMC(num_radii)
  rows, weights = draw_rows(matrix, 24, 8, 4000)
  z = np.sqrt(2.0) * directions(8)
  halves, radial_weights = gauss_laguerre(num_radii, 8)
  sign = -1.0 if kind == "trig" else 1.0
  square = np.sum(z**2, axis=1)
  expected = (
    hyp0f1(4.0, sign * halves[None, :] * square[:, None] / 2.0) @ radial_weights
  )
  samples = row_estimates(rows, weights, z, kind)
  scores = standard_scores(samples, expected)
  assert np.all(np.abs(scores) < 4.0), scores
  bias = np.abs(expected / gaussian_means(z, kind) - 1.0).max()
  assert bias < {2: 0.02, 3: 1e-3}[num_radii]


def test_radial_orthogonal_structure():
  rows, weights = draw_rows(SROMC(), 24, 8, 4000)
  np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-6)
  near, far = rows[:, ::2], rows[:, 1::2]
  ratio = np.linalg.norm(far, axis=2) / np.linalg.norm(near, axis=2)
  np.testing.assert_allclose(far, near * ratio[..., None], atol=1e-5)
  unit = near[:, :8] / np.linalg.norm(near[:, :8], axis=2, keepdims=True)
  gram = unit @ unit.transpose(0, 2, 1)
  expected = np.broadcast_to(np.eye(8), gram.shape)
  np.testing.assert_allclose(gram, expected, atol=1e-5)


def test_errors():
  ssr = sf.feature_map("posrf", "ssr", num_features=1)
  with pytest.raises(ValueError, match="num_features >= 2"):
    ssr.init(jax.random.key(0), head_dim=4)
  sr_omc = sf.feature_map("posrf", "sr_omc", num_features=7)
  with pytest.raises(ValueError, match="got num_features=7.*num_features=8"):
    sr_omc.init(jax.random.key(0), head_dim=4)
  with pytest.raises(
    ValueError, match="num_radii must be an integer from 1 to 16"
  ):
    SROMC(num_radii=17)
  with pytest.raises(
    ValueError, match="num_radii must be an integer from 1 to 16"
  ):
    SROMC(num_radii=0)
