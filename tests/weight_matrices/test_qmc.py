"""Quasi-Monte Carlo and Latin hypercube rows."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import spectraformer_jax as sf
from spectraformer_jax.weight_matrices import (
  LHS,
  QMC,
  QMCHalton,
  QMCLattice,
  QMCSobol,
  get_row_law,
  qmc,
)
from spectraformer_jax.weight_matrices.row_laws import ENTRY_LAWS
from tests.helpers import standard_scores
from tests.weight_matrices.helpers import (
  assert_first_moments,
  assert_rows_are_gaussian,
  directions,
  draw_rows,
  gaussian_means,
  row_estimates,
)

SCRAMBLINGS = ("shift", "lms", "owen")
SOBOL = [QMC(scrambling=scrambling) for scrambling in SCRAMBLINGS]
LATTICES = [QMCLattice(), QMCLattice(multiplier="random")]
DESIGNS = [*SOBOL, *LATTICES, QMC(sequence="halton"), LHS()]


def label(matrix):
  if isinstance(matrix, QMC):
    return f"{matrix.sequence}-{matrix.scrambling}-{matrix.multiplier}"
  return matrix.info.name


def unscrambled(num_points, dim):
  """Sobol points of the package, before randomisation."""
  table = jnp.asarray(qmc.sobol_directions()[:dim])
  return np.asarray(qmc.sobol_points(table, num_points))


def test_direction_numbers_are_those_of_scipy():
  columns = []
  for c in range(qmc.MAX_BITS):
    sobol = stats.qmc.Sobol(qmc.MAX_DIM, scramble=False, bits=30)
    if c:
      sobol.fast_forward(2**c - 1)
    before, after = (sobol.random(2) * 2.0**30).astype(np.uint32)
    columns.append((before ^ after) << np.uint32(2))
  table = qmc.sobol_directions()
  assert table.dtype == np.uint32
  np.testing.assert_array_equal(table, np.stack(columns, axis=1))


@pytest.mark.parametrize("dim", [5, 64])
def test_sobol_points_are_those_of_scipy(dim):
  points = unscrambled(1000, dim) / 2.0**32
  with warnings.catch_warnings():
    # 1000 is not a power of two.
    warnings.simplefilter("ignore", UserWarning)
    expected = stats.qmc.Sobol(dim, scramble=False, bits=30).random(1000)
  np.testing.assert_array_equal(points, expected)


@pytest.mark.parametrize("matrix", SOBOL, ids=label)
def test_sobol_stays_a_net_under_each_scrambling(matrix):
  num_rows, dim = 64, 40
  points, _ = draw_rows(matrix, num_rows, dim, 5, law="uniform")
  cells = np.sort(np.floor(points * num_rows), axis=1)
  expected = np.broadcast_to(np.arange(64)[None, :, None], cells.shape)
  np.testing.assert_array_equal(cells, expected)
  # Two coordinates: one point in each box of 2**a by 2**(6 - a) slices.
  for a in range(7):
    x = np.floor(points[:, :, 0] * 2**a)
    y = np.floor(points[:, :, 1] * 2 ** (6 - a))
    boxes = np.sort(x * 2 ** (6 - a) + y, axis=1)
    np.testing.assert_array_equal(boxes, expected[:, :, 0])


def test_each_scrambling_is_the_one_asked_for():
  points = unscrambled(64, 40) >> 9
  fourth = points[3] ^ points[5] ^ points[9]
  fourth = int(np.flatnonzero((points == fourth[None, :]).all(axis=1))[0])
  facts = {}
  for matrix in SOBOL:
    rows, _ = draw_rows(matrix, 64, 40, 5, law="uniform")
    bits = np.floor(rows[0] * 2**23).astype(np.uint32)
    one_flip = len(np.unique(bits ^ points, axis=0)) == 1
    affine = (bits[3] ^ bits[5] ^ bits[9] ^ bits[fourth] == 0).all()
    facts[matrix.scrambling] = (one_flip, bool(affine))
  expected = {"shift": (True, True), "lms": (False, True)}
  assert facts == {**expected, "owen": (False, False)}


def test_owen_flips_a_bit_by_the_bits_above_it_alone():
  # Points that agree in their top k bits still do, and differ in bit k + 1.
  pairs = np.array([[0x5A5A5A5A], [0x5A5A5A5A ^ (1 << 20)]], np.uint32)
  scramble = lambda rng: qmc.owen_scramble(rng, jnp.asarray(pairs))
  rngs = jax.random.split(jax.random.key(0), 2000)
  first, second = np.asarray(jax.vmap(scramble)(rngs))[:, :, 0].T
  different = first ^ second
  np.testing.assert_array_equal(different >> 20, 1)
  # Each lower bit of the difference is a fair coin: 4 errors of 2000 throws.
  bits = (different[:, None] >> np.arange(20)[None, :]) & 1
  assert np.abs(bits.mean(axis=0) - 0.5).max() < 4 * 0.5 / np.sqrt(2000)


def test_halton_points_are_those_of_scipy_shifted():
  expected = stats.qmc.Halton(30, scramble=False).random(200)
  points = qmc.halton_points(200, 30) / 2.0**32
  # 1e-9: coordinates are rounded to 32 bits.
  np.testing.assert_allclose(points, expected, atol=1e-9)
  rows, _ = draw_rows(QMC(sequence="halton"), 200, 30, 2, law="uniform")
  shift = (rows - expected[None]) % 1.0
  # 2**-23: uniforms keep 23 bits; on a circle, where 0 is next to 1.
  around = (shift - shift[:, :1] + 0.5) % 1.0 - 0.5
  assert np.abs(around).max() < 2.0**-22
  assert np.abs(shift[0, 0] - shift[1, 0]).min() > 1e-5, "another shift"


@pytest.mark.parametrize("matrix", LATTICES, ids=label)
@pytest.mark.parametrize("num_rows", [64, 47])
def test_lattice_is_one(matrix, num_rows):
  points, _ = draw_rows(matrix, num_rows, 12, 2, law="uniform")
  steps = (points - points[:, :1]) * num_rows
  # All of them multiples of 1/M, each once in every coordinate.
  np.testing.assert_allclose(steps, np.round(steps), atol=num_rows * 2.0**-22)
  cells = np.sort(np.round(steps) % num_rows, axis=1)
  assert (cells == np.arange(num_rows)[None, :, None]).all()
  # Closed under addition: point m is m times point 1.
  multiples = np.arange(num_rows)[None, :, None] * np.round(steps[:, 1:2])
  assert ((np.round(steps) - multiples) % num_rows == 0).all()


def test_lattice_repeats_no_coordinate_it_need_not_repeat():
  # Of 128 points there are 32 odd generators of one Korobov form up to sign.
  points = qmc.lattice_points(128, 32).astype(np.uint64)
  generators = (points[1] >> np.uint64(25)).astype(int)
  assert len(set(np.minimum(generators, 128 - generators))) == 32


def test_random_multipliers_are_odd_powers():
  rngs = jax.random.split(jax.random.key(0), 400)
  points = jax.vmap(lambda rng: qmc.random_lattice_points(rng, 128, 12))(rngs)
  steps = np.asarray(points[:, 1] >> 25).astype(int)
  multipliers = steps[:, 1]
  expected = [[pow(int(a), j, 128) for j in range(12)] for a in multipliers]
  np.testing.assert_array_equal(steps, expected)
  # 64 odd ones, each expected 6 times: none is missed but by a chance of 0.1.
  assert (multipliers % 2 == 1).all() and len(set(multipliers)) >= 62
  # At the limit of 2**16 rows, and where M does not divide 2**32.
  for num_points in (2**16, 50_001):
    points = qmc.random_lattice_points(rngs[0], num_points, 3)
    step = round(float(points[1, 1]) / 2.0**32 * num_points)
    residues = np.arange(num_points, dtype=object) * step % num_points
    exact = np.array([r * 2**32 // num_points for r in residues], np.uint32)
    np.testing.assert_array_equal(points[:, 1], exact)


def test_latin_hypercube_has_one_row_in_each_cell():
  num_rows = 50
  points, _ = draw_rows(LHS(), num_rows, 6, 200, law="uniform")
  cells = np.floor(points * num_rows)
  order = np.sort(cells, axis=1)
  assert (order == np.arange(num_rows)[None, :, None]).all()
  # Columns are permuted independently, and places inside cells are uniform.
  correlation = np.corrcoef(cells[:, :, 0].ravel(), cells[:, :, 1].ravel())
  assert abs(correlation[0, 1]) < 4 / np.sqrt(cells[:, :, 0].size)
  inside = points * num_rows - cells
  assert abs(inside.mean() - 0.5) < 4 / np.sqrt(12 * inside.size)


@pytest.mark.parametrize("matrix", DESIGNS, ids=label)
def test_rows_are_exactly_gaussian(matrix):
  rows, weights = draw_rows(matrix, 24, 8, 4000)
  assert_rows_are_gaussian(rows)
  assert_first_moments(rows, weights)


@pytest.mark.parametrize("matrix", DESIGNS, ids=label)
@pytest.mark.parametrize("kind", ["trig", "pos"])
def test_unbiased_in_adversarial_directions(matrix, kind):
  rows, weights = draw_rows(matrix, 24, 8, 4000)
  z = np.sqrt(2.0) * directions(8)
  samples = row_estimates(rows, weights, z, kind)
  scores = standard_scores(samples, gaussian_means(z, kind))
  assert np.all(np.abs(scores) < 4.0), scores


@pytest.mark.parametrize("matrix", [QMC(), LHS()], ids=label)
def test_any_entry_law(matrix):
  laws = {name: get_row_law(name) for name in ENTRY_LAWS}

  @jax.jit
  def draw_all(rng):
    drawn = {
      name: matrix.draw(rng, 64, 5, law)["w"] for name, law in laws.items()
    }
    uniforms = drawn["uniform"]
    return drawn, {
      name: law.from_uniform(uniforms) for name, law in laws.items()
    }

  drawn, expected = draw_all(jax.random.key(0))
  assert drawn["uniform"].min() > 0.0 and drawn["uniform"].max() < 1.0
  for name in ENTRY_LAWS:
    # 1e-6: two compilations of one inverse cdf.
    np.testing.assert_allclose(drawn[name], expected[name], rtol=1e-6)
  np.testing.assert_array_equal(drawn["rademacher"].sum(axis=0), 0.0)


@pytest.mark.parametrize("matrix", DESIGNS, ids=label)
def test_one_row_and_odd_sizes(matrix):
  for num_rows, dim in ((1, 1), (7, 5), (50, 24), (16, 32)):
    shape = jax.eval_shape(
      lambda rng, m=num_rows, h=dim: sf.compose(
        sf.components.PosRF(), matrix, num_features=m
      ).init(rng, head_dim=h, num_heads=2),
      jax.random.key(0),
    ).projection["rows"]["w"]
    assert shape.shape == (2, num_rows, dim)
    assert shape.dtype == jnp.float32


def test_registered_variants_are_options_of_qmc():
  for variant, sequence, scrambling in (
    (QMCSobol(), "sobol", "shift"),
    (QMCSobol(scrambling="owen"), "sobol", "owen"),
    (QMCLattice(), "lattice", "shift"),
    (QMCHalton(), "halton", "shift"),
  ):
    assert variant.info.name == f"qmc_{sequence}"
    assert variant.info.name in sf.list_weight_matrices()
    assert (variant.sequence, variant.scrambling) == (sequence, scrambling)
    options = QMC(sequence, scrambling)
    assert variant != options
    rng, law = jax.random.key(0), get_row_law("uniform")
    np.testing.assert_array_equal(
      variant.draw(rng, 8, 3, law)["w"], options.draw(rng, 8, 3, law)["w"]
    )
  with pytest.raises(ValueError, match="no option 'sequence'"):
    sf.feature_map(
      "posrf",
      "qmc_halton",
      num_features=8,
      weight_matrix_kwargs={"sequence": "sobol"},
    )


def test_errors_name_the_option_and_the_limit():
  with pytest.raises(ValueError, match="sequence must be one of"):
    QMC(sequence="faure")
  with pytest.raises(ValueError, match="scrambling must be one of"):
    QMC(scrambling="none")
  for sequence, scrambling in itertools.product(
    ("lattice", "halton"), ("lms", "owen")
  ):
    with pytest.raises(ValueError, match="sequence='sobol' alone"):
      QMC(sequence=sequence, scrambling=scrambling)
  with pytest.raises(ValueError, match="multiplier must be one of"):
    QMCLattice(multiplier=17)
  with pytest.raises(ValueError, match="sequence='lattice' alone"):
    QMC(multiplier="random")
  with pytest.raises(ValueError, match="<= 65536, got num_features=65537"):
    QMCLattice(multiplier="random").check(65537, 4)
  for num_features, head_dim in ((8, 257), (2**20 + 1, 4)):
    fm = sf.feature_map("posrf", "qmc", num_features=num_features)
    with pytest.raises(ValueError, match=r"head_dim <= 256 and .* <= 1048576"):
      fm.init(jax.random.key(0), head_dim=head_dim)
  QMCHalton().check(2**20 + 1, 257)
