"""Trigonometric features of isotropic kernels: formulas, coupling, the cap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax import mixing_laws
from spectraformer_jax.components import IsotropicTrig
from spectraformer_jax.feature_maps.prepared import component_state
from spectraformer_jax.typing import WeightSample
from spectraformer_jax.weight_matrices import stored_uniforms
from tests.components.helpers import (
  PAIRS,
  build,
  check_mean_and_square,
  first_head_state,
)

LAWS = {
  "laplacian": {"law": "laplacian"},
  "matern": {"law": "matern", "nu": 1.5},
  "rational_quadratic": {"law": "rational_quadratic", "b": 2.0},
  "exp_power": {"law": "exp_power", "alpha": 1.5},
  "gen_cauchy": {"law": "gen_cauchy", "alpha": 1.0, "b": 1.5},
  "kummer": {"law": "kummer", "a": 1.2, "b": 0.8},
}


def test_every_law_is_tested():
  assert LAWS.keys() == set(mixing_laws.LAWS.names())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.quick_every(6)
def test_mean_and_square(law):
  # A length scale at which the three pairs are near, typical and far.
  fm = build("isotropic_trig", length_scale=0.4, **LAWS[law])
  check_mean_and_square(fm, 20_000)


@pytest.mark.parametrize("law", ["laplacian", "matern", "gen_cauchy"])
@pytest.mark.quick_every(3)
def test_stratified_rows_keep_the_mean(law):
  fm = build("isotropic_trig", "orf", 6, length_scale=0.4, **LAWS[law])
  check_mean_and_square(fm, 4000, squares=False)


def draw(fm, **sizes):
  """Draws variables, in one program."""
  init = functools.partial(fm.init, **sizes)
  return jax.jit(init)(jax.random.key(0))


def rows_of(fm, head_dim):
  """Returns rows of W before and after T, and the uniforms, of one head."""
  variables = draw(fm, head_dim=head_dim)
  variables = jax.tree.map(lambda leaf: leaf[0], variables)
  state = component_state(variables, None)
  plain = WeightSample(variables.projection["rows"]["w"])
  realise = jax.jit(fm.component.realise_rows, static_argnums=1)
  rows = realise(plain, fm.num_features, state)
  uniform = stored_uniforms.to_uniform(state.random["scale_bits"])
  return plain.w, rows.w, np.asarray(uniform)


def test_each_row_has_a_scale_of_its_own_cell():
  plain, rows, uniform = rows_of(
    build("isotropic_trig", "orf", 12, law="gen_cauchy"), 4
  )
  assert uniform.shape == (12, 3)
  for column in uniform.T:
    np.testing.assert_array_equal(np.sort(np.floor(12 * column)), np.arange(12))
  # The orders are independent of each other.
  assert len({tuple(np.argsort(column)) for column in uniform.T}) == 3
  ratio = rows / plain
  np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones((1, 4)), rtol=1e-5)
  # Blocks are of four orthogonal rows.
  scales = np.sort(np.reshape(ratio[:, 0] ** 2, (3, 4)), axis=1)
  log_scale = mixing_laws.GeneralisedCauchy().log_scale(jnp.asarray(uniform.T))
  expected = np.minimum(np.exp(log_scale), 64.0 / np.sqrt(4.0))
  np.testing.assert_allclose(ratio[:, 0] ** 2, expected, rtol=1e-4)
  assert (np.diff(scales, axis=1) > 1e-4).sum() >= 6


@pytest.mark.parametrize("tau", [None, 2.0])
def test_the_cap_bounds_gradients(tau):
  fm = build("isotropic_trig", "iid", 64, law="exp_power", alpha=0.5, tau=tau)
  plain, rows, uniform = rows_of(fm, 16)
  cap = 64.0 / 4.0 if tau is None else tau
  norm = lambda w: np.sqrt(np.sum(np.square(w), axis=-1))
  ratio = norm(rows) / norm(plain)
  assert ratio.max() <= np.sqrt(cap) * (1.0 + 1e-5)
  law = mixing_laws.ExpPower(0.5)
  above = np.asarray(law.log_scale(jnp.asarray(uniform.T))) > np.log(cap)
  assert 0 < above.sum() < 64
  np.testing.assert_allclose(ratio[above], np.sqrt(cap), rtol=1e-5)


def test_laws_without_a_heavy_tail_are_not_capped():
  component = IsotropicTrig("rational_quadratic", b=0.25)
  fm = sf.compose(component, build("posrf").weight_matrix, num_features=512)
  plain, rows, _ = rows_of(fm, 64)
  assert ((rows / plain)[:, 0] ** 2).max() > 64.0 / np.sqrt(64.0)


def test_matern_of_one_half_is_the_laplacian():
  x = jax.random.normal(jax.random.key(1), (5, 1, 4))
  laplacian = build("isotropic_trig", "iid", 16)
  matern = build("isotropic_trig", "iid", 16, law="matern", nu=0.5)
  variables = draw(laplacian, head_dim=4)
  phi, psi = (
    jax.jit(functools.partial(fm.apply, side="key"))(variables, x)
    for fm in (laplacian, matern)
  )
  # The quantiles of the two laws agree to 1e-6, angles are below 30.
  np.testing.assert_allclose(phi, psi, atol=2e-5)


@pytest.mark.slow
def test_many_powers_are_the_gaussian_kernel():
  x = jax.random.normal(jax.random.key(1), (5, 1, 4))
  variables = draw(build("isotropic_trig", "iid", 16), head_dim=4)
  fm = build("isotropic_trig", "iid", 16, law="rational_quadratic", b=1e4)
  gaussian = build("trigrf", "iid", 16, kernel="gaussian")
  rows = {"rows": variables.projection["rows"]}
  np.testing.assert_allclose(
    fm.apply(variables, x, side="key"),
    gaussian.apply(variables._replace(projection=rows), x, side="key"),
    atol=0.05,  # T is 1 with a deviation of 1 %, angles are below 5
  )


@pytest.mark.parametrize("learned", ["per_dim", "scalar"])
@pytest.mark.quick_every(2)
def test_gradient_of_the_length_scale_is_that_of_the_kernel(learned):
  fm = build("isotropic_trig", "iid", 8, length_scale=0.7, learned=learned)
  x, y = jnp.asarray(PAIRS[2])
  state = first_head_state(fm)
  exact = jax.grad(
    lambda params: fm.component.kernel_value(
      x, y, state._replace(params=params)
    )
  )(state.params)["log_length_scale"]

  @jax.jit
  @jax.vmap
  def one_draw(rng):
    variables = fm.init(rng, head_dim=4)

    def estimate(params):
      phi, psi = (
        fm.apply(
          variables._replace(params=params), z[None, None, :], side="key"
        )
        for z in (x, y)
      )
      return jnp.sum(phi * psi)

    gradient = jax.grad(estimate)(variables.params)
    return gradient["component"]["log_length_scale"][0]

  samples = one_draw(jax.random.split(jax.random.key(1), 4000))
  samples = np.asarray(samples, np.float64)
  error = samples.std(axis=0) / np.sqrt(len(samples))
  scores = (samples.mean(axis=0) - np.asarray(exact)) / error
  assert np.all(np.abs(scores) < 4.0), scores
  assert np.max(np.abs(exact) / error) > 10.0


def test_gradients_at_equal_vectors_are_finite():
  fm = build("isotropic_trig", "iid", 8)
  state = first_head_state(fm)
  x = jnp.asarray(PAIRS[0, 0])
  gradient = jax.grad(fm.component.kernel_value)(x, x, state)
  np.testing.assert_array_equal(gradient, 0.0)


def test_bits_survive_a_projection_in_bfloat16():
  fm = build("isotropic_trig", "iid", 16)
  narrow, wide = (
    draw(fm, head_dim=4, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32)
  )
  bits = narrow.projection["component"]["scale_bits"]
  np.testing.assert_array_equal(
    bits, wide.projection["component"]["scale_bits"]
  )
  assert narrow.projection["rows"]["w"].dtype == jnp.bfloat16


def test_estimates_exact_attention_of_its_law():
  query, key, value = jax.random.normal(jax.random.key(1), (3, 1, 6, 2, 4))
  fm = build("isotropic_trig", "iid", 4096, law="matern", nu=2.5)
  variables = draw(fm, head_dim=4, num_heads=2)
  out = sf.spectral_attention(
    query, key, value, feature_map=fm, variables=variables
  )
  exact = sf.exact_attention(query, key, value, kernel=fm.component.mixing_law)
  uniform = jnp.mean(value, axis=1, keepdims=True)
  # Samples: 4096 rows leave an error of 3 % of the kernel at 0.
  error = float(jnp.linalg.norm(out - exact))
  assert error < 0.15 * float(jnp.linalg.norm(exact - uniform))


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"law": "laplace"}, "Unknown law 'laplace'. Did you mean 'laplacian'"),
    ({"nu": 1.5}, "law 'laplacian' has no option 'nu'. It takes none"),
    ({"law": "matern", "nu": 3.0}, "nu must be one of 0.5, 1.5, 2.5, got 3.0"),
    ({"learned": "all"}, "learned must be one of"),
    ({"length_scale": 0.0}, "length_scale must be positive and finite, got 0"),
    ({"tau": 0.0}, "tau must be positive and at most 100, got 0.0"),
    ({"tau": 1e6}, "tau must be positive and at most 100, got 1000000.0"),
    ({"law": "kummer", "tau": 2.0}, "'kummer' has no heavy tail to cap, so"),
  ],
)
def test_errors(options, words):
  with pytest.raises(ValueError, match=words):
    build("isotropic_trig", **options)
