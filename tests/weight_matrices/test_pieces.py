"""Rotations, norms and tables that weight matrices share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from spectraformer_jax.weight_matrices import pieces


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 64, 128])
@pytest.mark.quick_every(3)
def test_chi_ppf_is_the_quantile_function(dim):
  # Powers of two reach the tails, where the start matters most.
  tail = 2.0 ** -np.arange(1, 20)
  u = np.concatenate([tail, 1.0 - tail, np.linspace(0.01, 0.99, 99)])
  u = u.astype(np.float32)
  quantiles = jax.jit(pieces.chi_ppf, static_argnums=1)
  got = np.asarray(quantiles(u, dim), np.float64)
  exact = stats.chi(dim)
  upper = u.astype(np.float64) > 0.5
  want = np.where(upper, exact.isf(1.0 - u.astype(np.float64)), exact.ppf(u))
  # float32 rounding of the incomplete gamma function; 5e-4 is what is asked.
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("dim", [3, 32])
def test_chi_ppf_is_finite_and_increasing_at_the_extremes(dim):
  u = np.float32([2.0**-24, 1e-6, 0.5, 1.0 - 1e-6, 1.0 - 2.0**-24])
  r = np.asarray(jax.jit(pieces.chi_ppf, static_argnums=1)(u, dim))
  assert np.isfinite(r).all() and (np.diff(r) > 0.0).all()


def test_haar_is_orthogonal_and_uniform(rng):
  q = np.asarray(pieces.haar(rng, 4000, 4), np.float64)
  gram = q @ q.transpose(0, 2, 1)
  np.testing.assert_allclose(gram, np.tile(np.eye(4), (4000, 1, 1)), atol=1e-5)
  # Mean 0 and second moment 1/4 of every entry; without the sign correction
  # the diagonal has a mean of up to 0.8. 5 standard errors of 4000 draws.
  assert np.abs(q.mean(axis=0)).max() < 5 * 0.5 / np.sqrt(4000)
  assert np.abs((q**2).mean(axis=0) - 0.25).max() < 5 * 0.21 / np.sqrt(4000)
  # An entry of a uniform unit vector: (x + 1) / 2 is Beta(3/2, 3/2).
  for i in range(4):
    entry = (q[:, i, i] + 1.0) / 2.0
    assert stats.kstest(entry, stats.beta(1.5, 1.5).cdf).pvalue > 1e-4


def test_chi_norms_follow_their_law(rng):
  r = np.asarray(pieces.chi_norms(rng, 4000, 5))
  assert stats.kstest(r, stats.chi(5).cdf).pvalue > 1e-4


def test_row_norms_and_check_norms(rng):
  np.testing.assert_allclose(pieces.row_norms(rng, "sqrt_d", 3, 9), 3.0)
  np.testing.assert_array_equal(
    pieces.row_norms(rng, "chi", 3, 9), pieces.chi_norms(rng, 3, 9)
  )
  with pytest.raises(ValueError, match="norms must be one of .* got 'gauss'"):
    pieces.check_norms("gauss")


@pytest.mark.parametrize("num", [1, 2, 3, 50, 128, 1000])
def test_stratified_uniforms_hit_every_cell_once(rng, num):
  draw = jax.jit(pieces.stratified_uniforms, static_argnums=1)
  u = np.asarray(draw(rng, num), np.float64)
  np.testing.assert_array_equal(np.sort(np.floor(u * num)), np.arange(num))
  assert u.min() > 0.0 and u.max() < 1.0


def test_a_stratified_uniform_alone_is_uniform(rng):
  draw = jax.jit(jax.vmap(lambda rng: pieces.stratified_uniforms(rng, 5)))
  u = np.asarray(draw(jax.random.split(rng, 4000)))
  for column in (0, 4):
    assert stats.kstest(u[:, column], "uniform").pvalue > 1e-4


def test_hadamard_is_orthogonal_and_symmetric():
  for n in (1, 2, 8, 64):
    table = pieces.hadamard(n)
    np.testing.assert_allclose(table @ table, np.eye(n), atol=1e-6)
    np.testing.assert_array_equal(table, table.T)
    np.testing.assert_allclose(np.abs(table), n**-0.5, rtol=1e-6)
    assert table.dtype == np.float32
  with pytest.raises(ValueError, match="power of two, got 48"):
    pieces.hadamard(48)


def test_next_power_of_two():
  sizes = [pieces.next_power_of_two(n) for n in (1, 2, 3, 32, 33)]
  assert sizes == [1, 2, 4, 32, 64]


@pytest.mark.parametrize(("k", "dim"), [(2, 5), (3, 5), (5, 5), (6, 5)])
def test_simplex_has_equal_angles(k, dim):
  corners = pieces.simplex(k, dim).astype(np.float64)
  gram = np.where(np.eye(k, dtype=bool), 1.0, -1.0 / (k - 1))
  np.testing.assert_allclose(corners @ corners.T, gram, atol=1e-6)
  np.testing.assert_allclose(corners.sum(axis=0), 0.0, atol=1e-6)


def test_simplex_of_head_dim_corners_is_the_papers():
  d = 5
  e, ones = np.eye(d), np.r_[np.ones(d - 1), 0.0]
  paper = [
    np.sqrt(d / (d - 1)) * e[i] - (np.sqrt(d) + 1) / (d - 1) ** 1.5 * ones
    for i in range(d - 1)
  ]
  paper = np.array([*paper, ones / np.sqrt(d - 1)])
  ours = pieces.simplex(d, d)
  np.testing.assert_allclose(ours @ ours.T, paper @ paper.T, atol=1e-6)


def test_simplex_at_the_ends():
  np.testing.assert_array_equal(pieces.simplex(1, 3), [[1.0, 0.0, 0.0]])
  for k in (0, 7):
    with pytest.raises(ValueError, match=f"dim \\+ 1 = 6, got {k}"):
      pieces.simplex(k, 5)


def test_tables_are_shared_and_read_only():
  for make in (lambda: pieces.hadamard(4), lambda: pieces.simplex(3, 4)):
    assert make() is make()
    with pytest.raises(ValueError, match="read-only"):
      make()[0, 0] = 2.0


def test_chi_rows_keep_directions_and_replace_norms(rng):
  rows = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [-1e-3, 0.0]])
  got = np.asarray(pieces.chi_rows(rng, rows))
  gaussian = np.asarray(jax.random.normal(rng, (3, 2)))
  norms = np.linalg.norm(gaussian, axis=1)
  np.testing.assert_allclose(got[0], norms[0] * np.array([0.6, 0.8]), rtol=1e-5)
  np.testing.assert_array_equal(got[1], gaussian[1])
  np.testing.assert_allclose(got[2], [-norms[2], 0.0], rtol=1e-5)


def test_rescaled_rows_have_finite_gradients_at_zero():
  rows = jnp.asarray([[0.0, 0.0], [1.0, 2.0]])
  loss = lambda rows: jnp.sum(pieces.rescale_rows(rows, jnp.ones((2, 2)))[:, 0])
  assert np.isfinite(np.asarray(jax.grad(loss)(rows))).all()


def test_antithetic_rows_of_an_odd_number():
  half = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
  got = pieces.antithetic_rows(half, 3)
  np.testing.assert_array_equal(got, [[1.0, 2.0], [3.0, 4.0], [-1.0, -2.0]])
