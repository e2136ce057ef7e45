import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as distributions

import spectraformer_jax as sf
from spectraformer_jax.study.approximation import measure as lib
from spectraformer_jax.study.approximation.inputs import (
  make_inputs,
  random_inputs,
)
from spectraformer_jax.study.approximation.kernel_error import (
  has_kernel,
  kernel_ratios,
)


def figures(pair, num_features, inputs, scale, **options):
  options = lib.Options(**options)
  fm = sf.feature_map(*pair.split("-"), num_features=num_features)
  program = lib.prepare(fm, inputs, options)
  reference = lib.make_reference(inputs, scale, options)
  return lib.measure(program, inputs, scale, reference, options)


@pytest.fixture(scope="module")
def toy():
  return random_inputs(batch=1, length=16, num_heads=2, head_dim=8, seed=0)


@pytest.fixture(scope="module")
def posrf(toy):
  """Independent rows, few and many.

  At twice the scale tails are heavy: 150 draws then understate the mean square
  by several of its standard errors, as a simulation in numpy does, too.
  """
  return {
    size: figures("posrf-iid", size, toy, 0.25, draws=150, points=16)
    for size in (16, 64, 256)
  }


@pytest.mark.slow
def test_kernel_mse_is_that_of_the_closed_form(posrf):
  for row in posrf.values():
    standard_error = row.kernel_mse_ci / distributions.t.ppf(0.975, 149)
    off = row.kernel_mse - row.kernel_mse_iid
    assert abs(off) < 3.5 * standard_error
    assert standard_error < 0.15 * row.kernel_mse_iid  # it could be seen


@pytest.mark.slow
def test_kernel_is_unbiased(posrf):
  for row in posrf.values():
    assert abs(row.kernel_bias) < 1.8 * row.kernel_bias_ci
    assert row.kernel_bias_ci < 0.1


def test_errors_fall_like_one_over_root_m(posrf):
  sizes = np.log(list(posrf))
  for name, power, tolerance in (
    ("kernel_mse", 1.0, 0.08),
    ("error", 0.5, 0.08),
    ("output_variance", 1.0, 0.16),
  ):
    values = np.log([getattr(row, name) for row in posrf.values()])
    slope = distributions.linregress(sizes, values).slope
    assert slope == pytest.approx(-power, abs=tolerance), name


def test_error_is_made_by_the_draws_alone_where_rows_are_many(posrf):
  row = posrf[256]
  # The mean square is variance plus squared bias; a ratio of unbiased sums has
  # a bias of order 1/M, far below its standard deviation of order M^-1/2.
  square = row.error**2 + row.error_std**2 * 149 / 150
  assert row.output_variance + row.output_bias2 == pytest.approx(square)
  assert abs(row.output_bias2) < 0.1 * row.output_variance


def test_variance_and_bias_of_outputs():
  exact = np.zeros((1, 1, 1, 2)) + [3.0, 4.0]
  reference = lib.Reference(exact, 1.0, 1.0, 1.0)
  # Off by (1, 0) always, and by 2 up or down in the other number.
  outputs = [exact + [1.0, 2.0 * sign] for sign in (1, -1)]
  row = lib.attention_figures(outputs, reference)
  assert row.error == pytest.approx(5**0.5 / 5)
  assert row.error_std == pytest.approx(0.0)
  assert row.output_variance == pytest.approx(8 / 25)  # 2^2 * 2 / (2 - 1)
  assert row.output_bias2 == pytest.approx(5 / 25 - 8 / 25)
  single = lib.attention_figures(outputs[:1], reference)
  assert single.error_ci is None and single.output_variance is None


def test_uniform_error_by_hand():
  # Scores of the two visible keys are log 3 and 0: weights 3/4 and 1/4.
  root = np.log(3.0) ** 0.5
  query = np.full((1, 3, 1, 1), root)
  key = np.array([root, 0.0, 5.0]).reshape(1, 3, 1, 1)
  value = np.array([1.0, 0.0, 100.0]).reshape(1, 3, 1, 1)
  mask = np.array([[True, True, False]])
  reference = lib.make_reference(
    make_inputs("toy", query, key, value, mask), 1.0, lib.Options(draws=1)
  )
  np.testing.assert_allclose(
    reference.exact[0, :, 0, 0], [0.75, 0.75, 0.0], rtol=1e-6
  )
  assert reference.uniform_error == pytest.approx(0.25 / 0.75)
  causal = lib.make_reference(
    make_inputs("toy", query, key, value),
    1.0,
    lib.Options(draws=1, is_causal=True),
  )
  # The first query sees one key; of the third, the key that counts holds 100.
  weights = np.exp(root * key[0, :, 0, 0])
  exact = np.array([1.0, 0.75, weights @ value[0, :, 0, 0] / weights.sum()])
  uniform = np.array([1.0, 0.5, 101.0 / 3.0])
  assert causal.uniform_error == pytest.approx(
    lib.relative_error(uniform, exact), rel=1e-5
  )


def test_scale_multiplies_queries_and_keys(toy):
  scaled = dataclasses.replace(toy, query=2 * toy.query, key=2 * toy.key)
  options = lib.Options(draws=1)
  one, other = (
    lib.make_reference(toy, 2.0, options),
    lib.make_reference(scaled, 1.0, options),
  )
  np.testing.assert_array_equal(one.exact, other.exact)


def test_padding_counts_nowhere(toy):
  mask = np.arange(16)[None] < 10
  masked = make_inputs("toy", toy.query, toy.key, toy.value, mask)
  filled = make_inputs(
    "toy",
    *(
      np.where(mask[..., None, None], array, 1e3)
      for array in (toy.query, toy.key, toy.value)
    ),
    mask,
  )
  options = lib.Options(draws=2, points=8)
  fm = sf.feature_map("oprf", "iid", num_features=16)  # takes statistics
  program = lib.prepare(fm, masked, options)
  rows = [
    lib.measure(program, x, 0.5, lib.make_reference(x, 0.5, options), options)
    for x in (masked, filled)
  ]
  for name in ("error", "uniform_error", "kernel_mse", "kernel_mse_iid"):
    values = [getattr(row, name) for row in rows]
    assert values[0] == pytest.approx(values[1], rel=1e-5), name


@pytest.mark.parametrize(
  ("pair", "options"),
  [
    ("trigrf-iid", {}),
    ("oprf-iid", {"centred": True}),
    ("posrf-sgq", {}),  # signed rows
    ("posrf-iid", {"kernel": "gaussian"}),
    ("relu-iid", {}),
  ],
)
@pytest.mark.quick_every(5)
def test_ratios_are_those_of_products_of_features(toy, pair, options):
  component, matrix = pair.split("-")
  fm = sf.feature_map(
    component, matrix, num_features=17, component_kwargs=options
  )
  variables = fm.init(jax.random.key(1), head_dim=8, num_heads=2)
  x, y = 0.3 * jnp.asarray(toy.query), 0.4 * jnp.asarray(toy.key[:, :7])
  stats = fm.calibrate(variables, x, y)
  phi = fm.apply(variables, x, side="query", stats=stats)
  psi = fm.apply(variables, y, side="key", stats=stats)
  kernel = fm.kernel(variables, x[:, :, None], y[:, None], stats=stats)
  expected = jnp.einsum("btnf,bsnf->bnts", phi, psi)
  expected /= jnp.transpose(kernel, (0, 3, 1, 2))
  ratios = kernel_ratios(fm, variables, x, y, stats)
  assert ratios.shape == (1, 2, 16, 7)
  np.testing.assert_allclose(ratios, expected, rtol=2e-4, atol=1e-5)


def test_ratios_outside_of_float32(toy):
  # exp(x . y) overflows for equal x and y of norm 28; the ratio does not.
  fm = sf.feature_map("posrf", "iid", num_features=8)
  variables = fm.init(jax.random.key(1), head_dim=8)
  x = 10.0 * jnp.ones((1, 1, 1, 8))
  assert not jnp.isfinite(fm.kernel(variables, x, x)).all()
  assert jnp.isfinite(kernel_ratios(fm, variables, x, x, ())).all()


def test_maps_without_a_fixed_kernel():
  learnt = sf.feature_map("posrf", "generator", num_features=8)
  positional = sf.feature_map("cosformer", "none", num_features=None)
  assert not has_kernel(learnt) and not has_kernel(positional)
  assert has_kernel(sf.feature_map("posrf", "iid", num_features=8))


def test_values_of_zero_are_refused(toy):
  zeros = dataclasses.replace(toy, value=0 * toy.value)
  with pytest.raises(ValueError, match="exact attention gives zeros"):
    lib.make_reference(zeros, 1.0, lib.Options(draws=1))
