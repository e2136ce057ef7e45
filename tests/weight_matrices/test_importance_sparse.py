"""Importance-weighted rows, sparse rows, and variances of many designs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, kstest

import spectraformer_jax as sf
from spectraformer_jax.weight_matrices import (
  LHS,
  MM,
  QMC,
  SROMC,
  SSF,
  SSR,
  Importance,
  MMAnti,
  Sparse,
)
from tests.helpers import PAIRS, standard_scores
from tests.weight_matrices.helpers import (
  assert_first_moments,
  directions,
  draw_rows,
  gaussian_means,
  row_estimates,
)


@pytest.mark.parametrize("sigma", [0.9, 1.2])
@pytest.mark.parametrize("kind", ["trig", "pos"])
def test_importance_weights_are_unbiased(sigma, kind):
  rows, weights = draw_rows(Importance(sigma), 24, 8, 4000)
  z = np.sqrt(2.0) * directions(8)
  samples = row_estimates(rows, weights, z, kind)
  scores = standard_scores(samples, gaussian_means(z, kind))
  assert np.all(np.abs(scores) < 4.0), scores
  assert_first_moments(rows, weights)
  assert kstest(rows[:, 0, 0] / sigma, "norm").pvalue > 1e-4


def test_importance_sampling_of_posrf_is_oprf():
  # oprf with A is importance sampling with sigma^2 = 1 - 4A.
  rho = 0.7
  sigma = float(np.sqrt((1.0 + 1.0 / rho) / 2.0))
  importance = sf.feature_map(
    "posrf",
    "importance",
    num_features=16,
    weight_matrix_kwargs={"sigma": sigma},
  )
  oprf = sf.feature_map("oprf", "iid", num_features=16)
  variables = importance.init(jax.random.key(0), head_dim=4)
  base = {"rows": {"w": variables.projection["rows"]["w"] / sigma}}
  stats = {"component": {"rho": jnp.full((1, 1), rho)}}
  x = jnp.asarray(PAIRS[:, :1])
  for side in ("query", "key"):
    np.testing.assert_allclose(
      importance.apply(variables, x, side=side),
      oprf.apply(
        variables._replace(projection=base), x, side=side, stats=stats
      ),
      rtol=1e-5,
    )


def test_errors_of_importance():
  for sigma in (0.7, float("inf"), float("nan")):
    with pytest.raises(ValueError, match="sigma must be finite and above"):
      Importance(sigma)


@pytest.mark.parametrize("nonzeros", [2, 4])
def test_sparse_rows_have_so_many_entries(nonzeros):
  rows, weights = draw_rows(Sparse(nonzeros), 24, 8, 4000)
  np.testing.assert_array_equal((rows != 0.0).sum(axis=2), nonzeros)
  assert_first_moments(rows, weights)
  values = rows[:, 0][rows[:, 0] != 0.0] * np.sqrt(nonzeros / 8)
  assert kstest(values, "norm").pvalue > 1e-4


@pytest.mark.parametrize("nonzeros", [2, 4])
def test_mean_of_sparse_rows_is_that_over_subsets(nonzeros):
  head_dim = 8
  z = np.sqrt(2.0) * directions(head_dim)
  subsets = itertools.combinations(range(head_dim), nonzeros)
  squares = np.stack([np.sum(z[:, s] ** 2, axis=1) for s in map(list, subsets)])
  expected = np.exp(-0.5 * head_dim / nonzeros * squares).mean(axis=0)
  rows, weights = draw_rows(Sparse(nonzeros), 24, head_dim, 4000)
  samples = row_estimates(rows, weights, z, "trig")
  scores = standard_scores(samples, expected)
  assert np.all(np.abs(scores) < 4.0), scores
  biased = standard_scores(samples, gaussian_means(z, "trig"))
  assert biased.max() > 20.0, "too large on an axis"


@pytest.mark.parametrize("head_dim", [8, 6])
def test_mixed_sparse_rows(head_dim):
  rows, weights = draw_rows(Sparse(hadamard=True), 24, head_dim, 4000)
  assert_first_moments(rows, weights)
  squares = np.sum(rows[:, 0] ** 2, axis=1)
  assert kstest(squares, chi2(head_dim).cdf).pvalue > 1e-4
  assert (rows != 0.0).mean() > 0.6
  z = np.sqrt(2.0) * directions(head_dim)
  bias = row_estimates(rows, weights, z, "trig").mean(axis=0)
  # 0.09 at q = 4: no bias is as large as 0.5 of unmixed rows on an axis.
  assert np.abs(bias - gaussian_means(z, "trig")).max() < 0.1


def test_errors_of_sparse():
  with pytest.raises(ValueError, match="nonzeros must be a positive integer"):
    Sparse(nonzeros=0)
  fm = sf.feature_map("trigrf", "sparse", num_features=8)
  with pytest.raises(ValueError, match="nonzeros=4 at head_dim=3"):
    fm.init(jax.random.key(0), head_dim=3)
  Sparse(hadamard=True).check(8, 3)


@pytest.mark.parametrize(
  ("matrix", "trig", "pos"),
  [
    (QMC(), (0.19, 0.30), (0.11, 0.18)),
    (QMC(scrambling="owen"), (0.35, 0.55), (0.11, 0.18)),
    (QMC(sequence="lattice"), (0.5, 0.8), (0.17, 0.28)),
    (LHS(), (0.8, 1.05), (0.2, 0.33)),
    (MM(), (0.0, 0.05), (0.0, 0.1)),
    (MMAnti(), (0.03, 0.08), (0.0, 0.03)),
    (SSF(), (0.05, 0.1), (0.05, 0.1)),
    (SSR(), (0.06, 0.12), (0.06, 0.12)),
    (SROMC(), (0.03, 0.08), (1.1, 1.9)),
  ],
)
def test_variance_against_independent_rows(matrix, trig, pos):
  # H = 32, M = 128, x and y of N(0, 0.1^2 I): mean squared error over that of
  # independent rows, by the closed form.
  rows, weights = draw_rows(matrix, 128, 32, 400)
  random = np.random.default_rng(0)
  x, y = 0.1 * random.normal(size=(2, 32, 32))
  for kind, bounds in (("trig", trig), ("pos", pos)):
    z = x - y if kind == "trig" else x + y
    square = np.sum(z**2, axis=1)
    samples = row_estimates(rows, weights, z, kind) / gaussian_means(z, kind)
    error = np.mean((samples - 1.0) ** 2, axis=0)
    relative = np.exp(square) if kind == "pos" else np.cosh(square)
    ratio = np.mean(128 * error / (relative - 1.0))
    assert bounds[0] < ratio < bounds[1], (kind, ratio)
