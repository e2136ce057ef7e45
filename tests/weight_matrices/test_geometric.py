"""Angles and norms of orthogonal, simplex and repelling rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import spectraformer_jax as sf
from spectraformer_jax.weight_matrices import (
  NOMC,
  ORF,
  WEIGHT_MATRICES,
  ORFAntithetic,
  SimRF,
  SimRFPlus,
  get_row_law,
)
from spectraformer_jax.weight_matrices.repelling import (
  DELTA,
  repelling_directions,
  simplex_blocks,
)
from tests.weight_matrices.helpers import draw_once

GAUSSIAN = get_row_law("gaussian")


def unit(w):
  return w / np.linalg.norm(w, axis=-1, keepdims=True)


def gram(w):
  """Inner products of unit rows, without the diagonal."""
  return unit(w) @ unit(w).T - np.eye(len(w))


@pytest.mark.parametrize("name", ["orf", "orf_sqrtd", "orf_pnc", "orf_strat"])
def test_rows_of_a_block_are_orthogonal(rng, name):
  w = draw_once(name, rng, 20, 8)
  for start in (0, 8, 16):
    assert np.abs(gram(w[start : start + 8])).max() < 1e-5
  # Blocks are independent, not one matrix repeated.
  assert np.abs(unit(w)[:8] @ unit(w)[8:16].T).max() > 0.1


@pytest.mark.parametrize(
  "matrix",
  [ORF("sqrt_d"), ORFAntithetic("sqrt_d"), SimRF("sqrt_d"), NOMC("sqrt_d")],
)
def test_sqrt_d_norms_are_sqrt_d(rng, matrix):
  w = draw_once(matrix, rng, 20, 8)
  np.testing.assert_allclose(np.linalg.norm(w, axis=1), 8**0.5, rtol=1e-5)
  assert matrix.info.marginals == "approximate"


@pytest.mark.parametrize("num_rows", [12, 13])
@pytest.mark.parametrize(
  "name", ["antithetic", "orf_antithetic", "orf_sqrtd_anti"]
)
def test_rows_come_with_their_opposites(rng, name, num_rows):
  w = draw_once(name, rng, num_rows, 4)
  half = -(-num_rows // 2)
  np.testing.assert_array_equal(w[half:], -w[: num_rows - half])
  if name != "antithetic":
    assert np.abs(gram(w[:4])).max() < 1e-5


def test_cubature_is_exact_to_degree_three(rng):
  # With M = 2 H, sums of (w.a)(w.b) are M a.b, odd ones are 0, per draw.
  w = draw_once("orf_sqrtd_anti", rng, 16, 8)
  np.testing.assert_allclose(w.T @ w / 16, np.eye(8), atol=1e-5)
  cubic = np.einsum("mi,mj,mk->ijk", w, w, w)
  np.testing.assert_allclose(cubic, 0.0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 5])
def test_paired_norms_have_opposite_quantiles(rng, head_dim):
  w = draw_once("orf_pnc", rng, 2 * head_dim + 3, head_dim)
  u = stats.chi(head_dim).cdf(np.linalg.norm(w, axis=1))
  for block in (u[:head_dim], u[head_dim : 2 * head_dim], u[2 * head_dim :]):
    pairs = block[: len(block) // 2 * 2].reshape(-1, 2)
    np.testing.assert_allclose(pairs.sum(axis=1), 1.0, atol=1e-4)
  # Not one pair repeated.
  assert len(np.unique(u.round(3))) == len(u)


def test_stratified_norms_hit_every_cell(rng):
  w = draw_once("orf_strat", rng, 50, 8)
  u = stats.chi(8).cdf(np.linalg.norm(w, axis=1))
  cells = np.floor(50 * u).astype(int)
  np.testing.assert_array_equal(np.sort(cells), np.arange(50))
  assert (cells != np.sort(cells)).any()


def test_simplex_rows_of_whole_and_last_blocks(rng):
  w = draw_once("simrf", rng, 19, 8)
  for start, k in ((0, 8), (8, 8), (16, 3)):
    angles = gram(w[start : start + k])[~np.eye(k, dtype=bool)]
    np.testing.assert_allclose(angles, -1.0 / (k - 1), atol=1e-5)
  # A single row that remains has a direction, too.
  assert np.linalg.norm(draw_once("simrf", rng, 9, 8)[8]) > 0.5


def test_simplex_table_has_no_rows_past_the_last():
  table = simplex_blocks(5, 3)
  assert table.shape == (2, 3, 3)
  np.testing.assert_array_equal(table[1, 2], 0.0)
  assert simplex_blocks(5, 3) is table


def test_sweeps_keep_norms_and_shrink_the_sum(rng):
  # The same key gives both the same norms and rotations.
  plain, swept = (
    draw_once(matrix, rng, 19, 8) for matrix in (SimRF(), SimRFPlus())
  )
  norms = [np.linalg.norm(w, axis=1) for w in (plain, swept)]
  np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)
  for start in (0, 8, 16):
    block = slice(start, min(start + 8, 19))
    sums = [np.linalg.norm(w[block].sum(axis=0)) for w in (plain, swept)]
    assert sums[1] < 0.1 * sums[0]


def test_sweeps_leave_a_row_alone_alone(rng):
  plain, swept = (
    draw_once(matrix, rng, 9, 8) for matrix in (SimRF(), SimRFPlus())
  )
  np.testing.assert_allclose(plain[8], swept[8], atol=1e-5)


def energy(v):
  """What `nomc` minimises."""
  terms = 1.0 / (DELTA + 2.0 - 2.0 * (v @ v.T))
  return terms.sum() - np.trace(terms)


def test_repelling_directions_repel():
  v = repelling_directions(48, 16).astype(np.float64)
  np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1.0, rtol=1e-5)
  # Three independent orthogonal blocks are the alternative.
  blocks = [stats.ortho_group(16, seed=i).rvs() for i in range(3)]
  assert energy(v) < energy(np.concatenate(blocks))
  # A minimum: no small move helps.
  generator = np.random.default_rng(0)
  for _ in range(100):
    moved = unit(v + 0.05 * generator.standard_normal(v.shape))
    assert energy(moved) > energy(v)
  assert np.linalg.norm(v.sum(axis=0)) < 1e-2


def test_one_more_direction_than_dimensions_is_a_simplex():
  v = repelling_directions(9, 8)
  angles = (v @ v.T)[~np.eye(9, dtype=bool)]
  np.testing.assert_allclose(angles, -1 / 8, atol=1e-3)


def test_repelling_rows_are_the_table_rotated(rng):
  w = draw_once("nomc", rng, 48, 16)
  table = repelling_directions(48, 16)
  np.testing.assert_allclose(unit(w) @ unit(w).T, table @ table.T, atol=1e-5)
  assert repelling_directions(48, 16) is table
  with pytest.raises(ValueError, match="read-only"):
    table[0, 0] = 1.0


def test_few_repelling_rows_are_orthogonal(rng):
  np.testing.assert_array_equal(
    draw_once("nomc", rng, 6, 8), draw_once("orf", rng, 6, 8)
  )


@pytest.mark.parametrize(
  "name", ["orf", "orf_antithetic", "simrf", "simrf_plus", "nomc"]
)
def test_unknown_norms_are_refused(name):
  with pytest.raises(ValueError, match="norms must be one of .* got 'sqrtd'"):
    WEIGHT_MATRICES.build(name, {"norms": "sqrtd"})


def test_short_names_are_the_options():
  assert WEIGHT_MATRICES.build("orf_sqrtd") == ORF("sqrt_d")
  assert WEIGHT_MATRICES.build("orf_sqrtd_anti") == ORFAntithetic("sqrt_d")
  fm = sf.feature_map("posrf", "orf_sqrtd", num_features=8)
  assert fm.info.name == "posrf-orf_sqrtd" and not fm.info.unbiased


def test_redraw_inside_jit_gives_each_head_new_rows(rng):
  fm = sf.feature_map("posrf", "simrf_plus", num_features=6)
  old = fm.init(rng, head_dim=4, num_heads=2)
  new = jax.jit(fm.redraw)(jax.random.key(1), old)
  w = [variables.projection["rows"]["w"] for variables in (old, new)]
  assert w[0].shape == w[1].shape == (2, 6, 4)
  assert not jnp.allclose(w[0], w[1], atol=0.1)
  assert not jnp.allclose(w[1][0], w[1][1], atol=0.1)
