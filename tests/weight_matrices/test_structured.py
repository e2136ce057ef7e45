"""Structured rows are the products they are made of.

The fast products live here alone: they check the construction.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, stats

import spectraformer_jax as sf
from spectraformer_jax.components import PosRF
from spectraformer_jax.weight_matrices import (
  ROM,
  SCRF,
  SORF,
  WEIGHT_MATRICES,
  Butterfly,
  PModel,
  ROMHybrid,
  get_row_law,
)
from spectraformer_jax.weight_matrices.fastfood import fastfood_blocks
from spectraformer_jax.weight_matrices.hadamard import hadamard_product
from spectraformer_jax.weight_matrices.rotations import butterfly_matrix
from spectraformer_jax.weight_matrices.structural import (
  circulant,
  hankel,
  low_displacement,
  mix_inputs,
  skew_circulant,
  toeplitz,
)
from tests.weight_matrices.helpers import draw_once

GAUSSIAN = get_row_law("gaussian")
GENERATOR = np.random.default_rng(0)


def fwht(x):
  """Fast Walsh-Hadamard transform over sqrt(n), by sums and differences."""
  n = x.shape[-1]
  half = 1
  while half < n:
    a = x.reshape(-1, n // (2 * half), 2, half)
    x = np.stack([a[:, :, 0] + a[:, :, 1], a[:, :, 0] - a[:, :, 1]], axis=2)
    half *= 2
  return x.reshape(n) / np.sqrt(n)


def signs(*shape):
  return GENERATOR.choice([-1.0, 1.0], shape)


@pytest.mark.parametrize("num_factors", [2, 3])
def test_hadamard_product_is_signs_and_transforms(num_factors):
  d, x = signs(num_factors, 16), GENERATOR.standard_normal(16)
  fast = x
  for diagonal in d[::-1]:
    fast = fwht(diagonal * fast)
  dense = np.asarray(hadamard_product(jnp.asarray(d, jnp.float32)))
  np.testing.assert_allclose(dense @ x, fast, atol=1e-5)


@pytest.mark.parametrize("matrix", [SORF(), ROM(2), Butterfly("sqrt_d")])
def test_blocks_are_orthogonal(rng, matrix):
  w = draw_once(matrix, rng, 40, 16)
  for start in (0, 16):
    block = w[start : start + 16]
    np.testing.assert_allclose(block @ block.T, 16 * np.eye(16), atol=1e-4)
  assert np.abs(w[:16] - w[16:32]).max() > 0.1


def test_sorf_is_rom_of_three_factors(rng):
  for norms in ("sqrt_d", "chi"):
    np.testing.assert_array_equal(
      draw_once(SORF(norms), rng, 40, 12), draw_once(ROM(3, norms), rng, 40, 12)
    )


@pytest.mark.parametrize("matrix", [SORF(), ROM(2), ROMHybrid()])
def test_fresh_norms_keep_directions(rng, matrix):
  chi = dataclasses.replace(matrix, norms="chi")
  own, fresh = draw_once(matrix, rng, 64, 16), draw_once(chi, rng, 64, 16)
  unit = lambda w: w / np.linalg.norm(w, axis=1, keepdims=True)
  np.testing.assert_allclose(unit(own), unit(fresh), atol=1e-5)
  norms = np.linalg.norm(fresh, axis=1)
  assert stats.kstest(norms, stats.chi(16).cdf).pvalue > 1e-3


def test_no_row_vanishes_in_few_dimensions(rng):
  # A row of the 4 x 4 product can lie in the column that is dropped.
  matrix = ROM(3, "chi")
  many = jax.jit(jax.vmap(lambda rng: matrix.draw(rng, 4, 3, GAUSSIAN)["w"]))
  w = np.asarray(many(jax.random.split(rng, 500)))
  own = jax.jit(jax.vmap(lambda rng: ROM(3).draw(rng, 4, 3, GAUSSIAN)["w"]))
  lengths = np.linalg.norm(own(jax.random.split(rng, 500)), axis=-1)
  assert lengths.min() < 1e-3  # or this test tests nothing
  assert np.isfinite(w).all() and np.linalg.norm(w, axis=-1).min() > 1e-2


@pytest.mark.parametrize("circle_factor", ["outermost", "innermost"])
def test_a_complete_hybrid_block_is_a_tight_frame(rng, circle_factor):
  w = draw_once(ROMHybrid(circle_factor=circle_factor), rng, 64, 16)
  for block in (w[:32], w[32:]):
    np.testing.assert_allclose(block.T @ block, 32 * np.eye(16), atol=1e-4)
    # Real and imaginary rows of a unitary matrix, times sqrt(2 n).
    unitary = (block[:16] + 1j * block[16:]) / np.sqrt(32)
    np.testing.assert_allclose(
      unitary @ unitary.conj().T, np.eye(16), atol=1e-5
    )


@pytest.mark.parametrize("circle_factor", ["outermost", "innermost"])
def test_place_of_the_unit_circle_factor(rng, circle_factor):
  # Outermost, an axis-aligned input meets n phases. Innermost it meets one,
  # and all of its complex products have one argument.
  w = draw_once(ROMHybrid(circle_factor=circle_factor), rng, 32, 16)
  outermost = circle_factor == "outermost"
  real, imaginary = (
    fwht(half) if outermost else half for half in (w[:16, 0], w[16:, 0])
  )
  # One argument modulo pi: all squares point the same way.
  products = real + 1j * imaginary
  spread = 1.0 - np.abs(np.sum(products**2)) / np.sum(np.abs(products) ** 2)
  assert spread > 0.3 if outermost else spread < 1e-5


def test_the_unit_circle_factor_has_two_places():
  with pytest.raises(ValueError, match="circle_factor must be one of"):
    ROMHybrid(circle_factor="middle")


def test_rom_needs_two_factors():
  for bad in (1, 0, 2.0, True, None):
    with pytest.raises(ValueError, match=f"integer >= 2, got {bad!r}"):
      ROM(num_factors=bad)


def test_butterfly_is_layers_of_rotations():
  n, order = 8, np.stack([GENERATOR.permutation(8) for _ in range(3)])
  d, theta = signs(3, n), GENERATOR.uniform(0, 2 * np.pi, (3, 3, n // 2))
  x = GENERATOR.standard_normal(n)
  fast = x.copy()
  for stage in range(3):
    fast = (d[stage] * fast)[order[stage]]
    for layer in range(3):
      low = [i for i in range(n) if not i >> layer & 1]
      for i, angle in zip(low, theta[stage, layer], strict=True):
        a, b = fast[i], fast[i + (1 << layer)]
        fast[i] = np.cos(angle) * a - np.sin(angle) * b
        fast[i + (1 << layer)] = np.sin(angle) * a + np.cos(angle) * b
  dense = butterfly_matrix(
    jnp.asarray(d, jnp.float32),
    jnp.asarray(order),
    jnp.asarray(theta, jnp.float32),
  )
  np.testing.assert_allclose(np.asarray(dense) @ x, fast, atol=1e-5)


def test_learnable_butterfly_stays_orthogonal_and_learns(rng):
  matrix = Butterfly(norms="sqrt_d", learnable=True)
  assert matrix.info.learnable and not matrix.info.redrawable
  assert not Butterfly().info.learnable and Butterfly().info.redrawable
  params = matrix.init(rng, 16, 8)
  assert params["angles"].shape == (2, 3, 3, 4)
  # 72 uniform angles: one misses an end of 0.5 with probability 2e-3.
  assert params["angles"].min() < 0.5 and params["angles"].max() > 5.8
  drawn = matrix.draw(jax.random.key(1), 16, 8, GAUSSIAN)
  assert drawn["permutation"].dtype == jnp.int32  # stored as float32

  def loss(params):
    w = matrix.rows(params, drawn).w
    return jnp.sum(jnp.cos(w)), w

  gradient, w = jax.jit(jax.grad(loss, has_aux=True))(params)
  gradient = np.asarray(gradient["angles"])
  assert np.isfinite(gradient).all() and (gradient != 0.0).mean() > 0.9
  moved = {"angles": params["angles"] - 0.3 * gradient}
  after, new = jax.jit(loss)(moved)
  assert after < jnp.sum(jnp.cos(w)) and np.abs(new - w).max() > 0.05
  for block in np.asarray(new).reshape(2, 8, 8):
    np.testing.assert_allclose(block @ block.T, 8 * np.eye(8), atol=1e-4)


def test_learnable_butterfly_in_a_feature_map(rng):
  fm = sf.compose(PosRF(), Butterfly(learnable=True), num_features=6)
  variables = fm.init(rng, head_dim=4, num_heads=2)
  assert variables.params["rows"]["angles"].shape == (2, 2, 3, 2, 2)
  x = jnp.full((3, 2, 4), 0.2)

  def loss(params):
    phi = fm.apply(variables._replace(params=params), x, side="key")
    return jnp.sum(jnp.square(phi))

  gradient = jax.jit(jax.grad(loss))(variables.params)["rows"]["angles"]
  # Angles of planes that only later columns see may have no gradient.
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-4
  with pytest.raises(ValueError, match="cannot be redrawn"):
    fm.redraw(rng, variables)


def test_fastfood_is_signs_transforms_and_a_permutation():
  n = 16
  b, g, s = signs(n), GENERATOR.standard_normal(n), GENERATOR.uniform(1, 2, n)
  order, x = GENERATOR.permutation(n), GENERATOR.standard_normal(n)
  fast = np.sqrt(n) * s * fwht(g * fwht(b * x)[order])
  dense = fastfood_blocks(
    *(jnp.asarray(a, jnp.float32)[None] for a in (s, g)),
    jnp.asarray(order)[None],
    jnp.asarray(b, jnp.float32)[None],
  )
  np.testing.assert_allclose(np.asarray(dense[0]) @ x, fast, atol=1e-4)


def test_fastfood_rows_are_alike_as_they_should_be(rng):
  # Mean squared cosine of two rows of a block: 2 / (n + 2), not 1 / n.
  matrix = WEIGHT_MATRICES.build("fastfood")
  many = jax.jit(jax.vmap(lambda rng: matrix.draw(rng, 16, 16, GAUSSIAN)["w"]))
  w = np.asarray(many(jax.random.split(rng, 2000)), np.float64)
  w /= np.linalg.norm(w, axis=-1, keepdims=True)
  squares = (w @ w.transpose(0, 2, 1)) ** 2
  mean = (squares.sum(axis=(1, 2)) - 16) / (16 * 15)
  error = mean.std() / np.sqrt(2000)
  assert abs(mean.mean() - 2 / 18) < 4 * error
  assert abs(mean.mean() - 1 / 16) > 20 * error


def test_circulant_is_a_convolution():
  g, b, x = GENERATOR.standard_normal((3, 9))
  fast = np.fft.irfft(np.fft.rfft(g) * np.fft.rfft(b * x), 9)
  dense = np.asarray(circulant(jnp.asarray(g, jnp.float32))) * b
  np.testing.assert_allclose(dense @ x, fast, atol=1e-5)
  np.testing.assert_allclose(dense / b, linalg.circulant(g), rtol=1e-6)


def test_scrf_has_its_signs_on_the_columns(rng):
  w = draw_once("scrf", rng, 24, 9)
  for block in (w[:9], w[9:18]):
    # Row i + 1 is row i, shifted, but for signs of columns.
    ratio = block[1:, 1:] / block[:-1, :-1]
    np.testing.assert_allclose(np.abs(ratio), 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio, np.tile(ratio[:1], (8, 1)), rtol=1e-6)
    np.testing.assert_allclose(
      np.linalg.norm(block, axis=1), np.linalg.norm(block[0]), rtol=1e-6
    )
  assert (ratio[0] < 0).any() and (ratio[0] > 0).any()


@pytest.mark.parametrize("kind", ["scrf", "toeplitz"])
def test_fresh_norms_are_independent_chi(rng, kind):
  make = SCRF if kind == "scrf" else lambda norms: PModel(kind, norms)
  shared, chi = (draw_once(make(n), rng, 90, 9) for n in ("shared", "chi"))
  unit = lambda w: w / np.linalg.norm(w, axis=1, keepdims=True)
  np.testing.assert_allclose(unit(shared), unit(chi), atol=1e-5)
  norms = np.linalg.norm(chi, axis=1)
  assert stats.kstest(norms, stats.chi(9).cdf).pvalue > 1e-3


def test_toeplitz_and_hankel_are_convolutions():
  m, d = 13, 6
  g, x = GENERATOR.standard_normal(m + d - 1), GENERATOR.standard_normal(d)
  size = 32  # at least m + 2 (d - 1): nothing wraps around
  product = np.fft.irfft(np.fft.rfft(g, size) * np.fft.rfft(x, size), size)
  fast = product[d - 1 : d - 1 + m]
  dense = np.asarray(toeplitz(jnp.asarray(g, jnp.float32), m, d))
  np.testing.assert_allclose(dense @ x, fast, atol=1e-5)
  scipys = linalg.toeplitz(g[d - 1 :], g[d - 1 :: -1])
  np.testing.assert_allclose(dense, scipys, rtol=1e-6)
  turned = np.asarray(hankel(jnp.asarray(g, jnp.float32), m, d))
  np.testing.assert_allclose(turned @ x[::-1], fast, atol=1e-5)


def test_skew_circulant_is_a_convolution_with_a_sign():
  g, x = GENERATOR.standard_normal((2, 8))
  # Multiplication of polynomials modulo z^8 + 1.
  full = np.convolve(g, x)
  fast = full[:8] - np.append(full[8:], 0.0)
  dense = np.asarray(skew_circulant(jnp.asarray(g, jnp.float32)))
  np.testing.assert_allclose(dense @ x, fast, atol=1e-5)


@pytest.mark.parametrize("dim", [4, 16])
def test_low_displacement_rows_have_mean_covariance_one(rng, dim):
  many = jax.jit(lambda rng: low_displacement(rng, 4000, dim, 3))
  blocks = np.asarray(many(rng), np.float64)
  second = np.einsum("bmi,bmj->ij", blocks, blocks) / (4000 * dim)
  np.testing.assert_allclose(second, np.eye(dim), atol=0.04)  # 4 std errors
  # Displacement rank: Z_1 A - A Z_{-1} has the rank of the sum, 3.
  if dim == 16:
    up = np.roll(np.eye(dim), 1, axis=0)
    skew = up.copy()
    skew[0, -1] = -1.0
    displaced = up @ blocks[0] - blocks[0] @ skew
    assert np.linalg.matrix_rank(displaced, tol=1e-4) == 3
    assert np.linalg.matrix_rank(blocks[0], tol=1e-4) == dim


@pytest.mark.parametrize("n", [8, 6])
def test_inputs_are_mixed_by_an_orthogonal_matrix(rng, n):
  mixed = np.asarray(mix_inputs(rng, jnp.eye(n)[None])[0], np.float64)
  np.testing.assert_allclose(mixed @ mixed.T, np.eye(n), atol=1e-5)
  # A power of two spreads an axis over all coordinates.
  size = n**-0.5 if n == 8 else 1.0
  np.testing.assert_allclose(np.abs(mixed).max(axis=0), size, rtol=1e-5)
  assert (mixed < -0.1).any()


def test_p_model_by_kind_and_by_name(rng):
  for kind in ("toeplitz", "hankel", "circulant", "ldr"):
    named = WEIGHT_MATRICES.build(f"pmodel_{kind}")
    np.testing.assert_array_equal(
      draw_once(named, rng, 20, 6), draw_once(PModel(kind), rng, 20, 6)
    )
    assert named.info.name == f"pmodel_{kind}"
    assert PModel(kind).info.name == "pmodel"
  with pytest.raises(ValueError, match="'pmodel_ldr' has no option 'kind'"):
    WEIGHT_MATRICES.build("pmodel_ldr", {"kind": "hankel"})
  with pytest.raises(ValueError, match="'pmodel_hankel' has no option 'rank'"):
    WEIGHT_MATRICES.build("pmodel_hankel", {"rank": 2})


def test_rank_changes_low_displacement_rows(rng):
  one, two = (draw_once(PModel("ldr", rank=r), rng, 16, 16) for r in (1, 2))
  assert not np.allclose(one, two, atol=0.1)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"kind": "tepliz"}, "kind must be one of .* got 'tepliz'"),
    ({"norms": "sqrt_d"}, "norms must be one of .* got 'sqrt_d'"),
    ({"rank": 2}, "rank=2 is for kind='ldr'; kind='toeplitz' takes None"),
    ({"kind": "ldr", "rank": 0}, "rank must be a positive integer, got 0"),
  ],
)
def test_p_model_refuses_what_it_cannot_do(options, message):
  with pytest.raises(ValueError, match=message):
    PModel(**options)


@pytest.mark.parametrize("name", ["sorf", "rom", "rom_hybrid", "butterfly"])
def test_unknown_norms_are_refused(name):
  with pytest.raises(ValueError, match="norms must be one of .* got 'shared'"):
    WEIGHT_MATRICES.build(name, {"norms": "shared"})


def test_scrf_norms_and_name():
  assert WEIGHT_MATRICES.build("scrf_chi") == SCRF("chi")
  with pytest.raises(ValueError, match="norms must be one of .* got 'sqrt_d'"):
    SCRF("sqrt_d")
