"""Moment matching and spherical structured rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import hyp0f1
from scipy.stats import chi

import spectraformer_jax as sf
from spectraformer_jax.weight_matrices import MM, SSF, MMAnti, MMChi
from spectraformer_jax.weight_matrices.spherical_structured import (
  choose_frequencies,
  structured_points,
)
from tests.helpers import standard_scores
from tests.weight_matrices.helpers import (
  assert_first_moments,
  assert_rows_are_gaussian,
  directions,
  draw_rows,
  gaussian_means,
  row_estimates,
)

EXACT = [MMChi(), SSF(), SSF(norms="chi")]


def label(matrix):
  return matrix.info.name + getattr(matrix, "norms", "")


def matched_means(z, kind, num_matched):
  """Means of `row_estimates` under moment matching of that many rows."""
  order = (num_matched - 1) / 2
  sign = -1.0 if kind == "trig" else 1.0
  return hyp0f1(order, sign * order * np.sum(z**2, axis=-1) / 2)


@pytest.mark.parametrize("matrix", EXACT, ids=label)
def test_rows_are_exactly_gaussian(matrix):
  rows, weights = draw_rows(matrix, 24, 8, 4000)
  assert_rows_are_gaussian(rows)
  assert_first_moments(rows, weights)


@pytest.mark.parametrize("matrix", EXACT, ids=label)
@pytest.mark.parametrize("kind", ["trig", "pos"])
def test_unbiased_in_adversarial_directions(matrix, kind):
  rows, weights = draw_rows(matrix, 24, 8, 4000)
  z = np.sqrt(2.0) * directions(8)
  samples = row_estimates(rows, weights, z, kind)
  scores = standard_scores(samples, gaussian_means(z, kind))
  assert np.all(np.abs(scores) < 4.0), scores


@pytest.mark.parametrize("matrix", [MM(), MMAnti()], ids=label)
@pytest.mark.parametrize("kind", ["trig", "pos"])
def test_bias_of_moment_matching_is_that_of_the_formula(matrix, kind):
  rows, weights = draw_rows(matrix, 24, 8, 4000)
  z = np.sqrt(2.0) * directions(8)
  samples = row_estimates(rows, weights, z, kind)
  num_matched = 12 if matrix == MMAnti() else 24
  scores = standard_scores(samples, matched_means(z, kind, num_matched))
  assert np.all(np.abs(scores) < 4.0), scores
  biased = standard_scores(samples, gaussian_means(z, kind))
  assert np.abs(biased).min() > 8.0, "the bias is measurable here"


def test_moments_match_in_each_draw():
  rows, weights = draw_rows(MM(), 24, 8, 4000)
  # 1e-5: float32 rounding.
  np.testing.assert_allclose(rows.mean(axis=1), 0.0, atol=1e-5)
  covariance = np.einsum("rm,rmi,rmj->rij", weights, rows, rows)
  expected = np.broadcast_to(np.eye(8), covariance.shape)
  np.testing.assert_allclose(covariance, expected, atol=1e-5)


def test_smallest_matched_design_is_a_simplex():
  rows, _ = draw_rows(MM(), 9, 8, 20)
  gram = rows @ rows.transpose(0, 2, 1)
  expected = np.broadcast_to(9.0 * np.eye(9) - 1.0, gram.shape)
  # 1e-3: nine Gaussian vectors less their mean can be close to a plane.
  np.testing.assert_allclose(gram, expected, atol=1e-3)


def test_antithetic_rows_come_in_pairs():
  rows, _ = draw_rows(MMAnti(), 24, 8, 4000)
  np.testing.assert_array_equal(rows[:, 12:], -rows[:, :12])
  covariance = np.einsum("rmi,rmj->rij", rows[:, :12], rows[:, :12]) / 12
  expected = np.broadcast_to(np.eye(8), covariance.shape)
  np.testing.assert_allclose(covariance, expected, atol=1e-5)
  odd, _ = draw_rows(MMAnti(), 17, 8, 20)
  assert odd.shape == (20, 17, 8)
  np.testing.assert_array_equal(odd[:, 9:], -odd[:, :8])


def test_matched_directions_keep_their_angles_under_chi_norms():
  rows, _ = draw_rows(MMChi(), 9, 8, 20)
  unit = rows / np.linalg.norm(rows, axis=2, keepdims=True)
  gram = unit @ unit.transpose(0, 2, 1)
  expected = np.broadcast_to((9.0 * np.eye(9) - 1.0) / 8.0, gram.shape)
  np.testing.assert_allclose(gram, expected, atol=1e-4)


@pytest.mark.parametrize("sizes", [(24, 8), (25, 8)])
def test_structured_directions_are_a_rotation_of_the_table(sizes):
  num_rows, head_dim = sizes
  table = structured_points(num_rows, head_dim).astype(np.float64)
  assert table.shape == sizes
  np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1.0, atol=1e-6)
  assert len(np.unique(table.round(5), axis=0)) == num_rows
  rows, _ = draw_rows(SSF(), num_rows, head_dim, 4000)
  unit = rows / np.linalg.norm(rows, axis=2, keepdims=True)
  gram = unit @ unit.transpose(0, 2, 1)
  expected = np.broadcast_to(table @ table.T, gram.shape)
  np.testing.assert_allclose(gram, expected, atol=1e-5)
  assert np.abs(unit[0] - unit[1]).max() > 0.1, "rotated anew in each draw"


@pytest.mark.parametrize("sizes", [(9, 7), (5, 1)])
def test_structured_rows_of_odd_head_dim(sizes):
  rows, weights = draw_rows(SSF(), *sizes, 4000)
  assert_rows_are_gaussian(rows)
  assert_first_moments(rows, weights)


def test_structured_points_follow_the_construction():
  table = structured_points(24, 8).astype(np.float64)
  gram = table @ table.T
  frequencies = np.array(choose_frequencies(24, 8))
  assert len(set(frequencies)) == 4
  assert frequencies.min() >= 1 and frequencies.max() <= 11
  lags = np.arange(12)[:, None] - np.arange(12)[None, :]
  angles = 2.0 * np.pi * lags[..., None] * frequencies / 12
  cos, sin = np.cos(angles).mean(axis=-1), np.sin(angles).mean(axis=-1)
  np.testing.assert_allclose(gram[:12, :12], cos, atol=1e-6)
  np.testing.assert_allclose(gram[12:, 12:], cos, atol=1e-6)
  np.testing.assert_allclose(gram[:12, 12:], sin, atol=1e-6)


@pytest.mark.parametrize("sizes", [(64, 16), (128, 32), (600, 16)])
def test_chosen_frequencies_have_low_energy(sizes):
  num_rows, head_dim = sizes
  num_times, size = num_rows // 2, head_dim // 2

  def energy(frequencies):
    angles = 2.0 * np.pi * np.outer(frequencies, np.arange(num_times))
    cos = np.cos(angles / num_times).mean(axis=0)
    sin = np.sin(angles / num_times).mean(axis=0)
    distances = np.concatenate([2.0 - 2.0 * cos[1:], 2.0 - 2.0 * sin])
    return np.sum(1.0 / np.maximum(distances, 1e-9))

  random = np.random.default_rng(0)
  others = [
    energy(random.choice(np.arange(1, num_times), size, replace=False))
    for _ in range(100)
  ]
  assert energy(choose_frequencies(num_rows, head_dim)) < min(others)


def test_stratified_norms_have_one_in_each_cell():
  num_rows, head_dim = 24, 8
  for matrix, stratified in ((SSF(), True), (SSF(norms="chi"), False)):
    rows, _ = draw_rows(matrix, num_rows, head_dim, 4000)
    levels = chi(head_dim).cdf(np.linalg.norm(rows, axis=2))
    cells = np.sort(np.floor(levels * num_rows), axis=1)
    # A float32 norm near a border may land one cell off, rarely.
    wrong = np.mean(cells != np.arange(num_rows)[None, :])
    assert wrong < 1e-3 if stratified else wrong > 0.3, wrong


@pytest.mark.parametrize(
  ("name", "num_features", "head_dim", "message"),
  [
    ("mm", 8, 8, "num_features > head_dim.*at least 9"),
    ("mm_chi", 8, 8, "num_features > head_dim.*at least 9"),
    ("mm_anti", 16, 8, "num_features > 2 head_dim.*at least 17"),
    ("ssf", 8, 8, r"num_features > 2 ceil\(head_dim / 2\).*at least 9"),
    ("ssf", 8, 7, r"num_features > 2 ceil\(head_dim / 2\).*at least 9"),
  ],
)
def test_sizes_that_cannot_be_made(name, num_features, head_dim, message):
  fm = sf.feature_map("posrf", name, num_features=num_features)
  with pytest.raises(ValueError, match=message):
    fm.init(jax.random.key(0), head_dim=head_dim)


def test_unknown_norms():
  with pytest.raises(ValueError, match="norms must be one of"):
    SSF(norms="sqrt_d")


def test_the_search_for_frequencies_is_done_once():
  structured_points(40, 10)
  before = structured_points.cache_info().hits
  fm = sf.feature_map("posrf", "ssf", num_features=40)
  jax.eval_shape(lambda rng: fm.init(rng, head_dim=10), jax.random.key(0))
  assert structured_points.cache_info().hits == before + 1
  assert not structured_points(40, 10).flags.writeable
  assert jnp.asarray(structured_points(40, 10)).dtype == jnp.float32
