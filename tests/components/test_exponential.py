"""Exponential components: means, second moments, identities, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import spectraformer_jax as sf
from spectraformer_jax.components import ComponentState, build_component
from spectraformer_jax.typing import WeightSample
from tests.components.helpers import (
  CASES,
  as_matrix,
  build_case,
  calibrate,
  calibrated_state,
  case_component,
  dense_form,
  dense_log_features,
  dense_log_second_moment,
  draw_data,
  random_rotation,
)
from tests.helpers import PAIRS, estimates, standard_scores

KERNELS = ["softmax", "gaussian"]
DENSE = ["saderf", "perdim", "sderf", "aderf", "asderf"]


def kernel_values(kernel, pairs=PAIRS):
  """Returns the exact kernels of pairs, in float64."""
  x, y = pairs[:, 0].astype(np.float64), pairs[:, 1].astype(np.float64)
  if kernel == "softmax":
    return np.exp(np.sum(x * y, -1))
  return np.exp(-0.5 * np.sum((x - y) ** 2, -1))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(16)
def test_mean_and_second_moment(case, kernel):
  num_features = 32
  fm = build_case(case, num_features, kernel=kernel)
  samples = estimates(
    fm, jax.random.key(1), PAIRS, 8_000, stats=calibrate(fm)
  ).astype(np.float64)
  expected = kernel_values(kernel)
  scores = standard_scores(samples, expected)
  # Opposite vectors make some maps exact: what is left is float32 rounding.
  exact = samples.std(axis=0) < 1e-5 * expected
  assert np.all((np.abs(scores) < 4.0) | exact), scores
  np.testing.assert_allclose(samples.mean(0)[exact], expected[exact], rtol=1e-5)

  component = case_component(case, kernel=kernel)
  log_moment = component.log_second_moment(
    jnp.asarray(PAIRS[:, 0]),
    jnp.asarray(PAIRS[:, 1]),
    calibrated_state(component),
  )
  variance = np.exp(np.asarray(log_moment, np.float64)) - expected**2
  squares = num_features * (samples - expected) ** 2
  scores = standard_scores(squares, variance)
  assert np.all((np.abs(scores) < 5.0) | exact), scores
  # log_second_moment is float32: 1e-6 of the moment is its rounding.
  assert np.all(np.abs(variance[exact]) < 3e-6 * expected[exact] ** 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("matrix", ["iid", "orf"])
@pytest.mark.quick_every(3)
def test_gerf_with_a_zero_is_posrf_and_trigrf(kernel, matrix):
  x = jnp.asarray(draw_data()[0])[:, None, :]
  for sign, other in ((1, "posrf"), (-1, "trigrf")):
    gerf = sf.feature_map(
      "gerf",
      matrix,
      num_features=8,
      component_kwargs={"a": 0.0, "sign": sign, "kernel": kernel},
    )
    plain = sf.feature_map(
      other, matrix, num_features=8, component_kwargs={"kernel": kernel}
    )
    assert gerf.info.positive == plain.info.positive
    assert gerf.feature_dim == plain.feature_dim
    variables = plain.init(jax.random.key(0), head_dim=4)
    for side in ("query", "key"):
      np.testing.assert_allclose(
        gerf.apply(variables, x, side=side),
        plain.apply(variables, x, side=side),
        rtol=1e-6,
        atol=1e-7,
      )


def test_gerf_default_is_oprf_of_constant_statistics():
  x = jnp.asarray(draw_data()[0])[:, None, :]
  fm = build_case("gerf_default")
  variables = fm.init(jax.random.key(0), head_dim=4)
  for gerf in (
    fm,
    build_case("gerf_learn_sigmoid"),
    build_case("gerf_default", learn="exp"),
  ):
    np.testing.assert_allclose(
      gerf.apply(gerf.init(jax.random.key(0), head_dim=4), x, side="key"),
      build_case("oprf", statistics="constant").apply(variables, x, side="key"),
      rtol=1e-5,
    )


def test_complex_gerf_without_the_minus_sign_estimates_another_kernel():
  # What the minus sign on the key's imaginary part is for.
  fm = build_case("gerf_minus_complex", 32)
  variables = fm.init(jax.random.key(0), head_dim=4)
  x = jnp.asarray(PAIRS[:, 0])[:, None, :]
  query = fm.apply(variables, x, side="query")[:, 0]
  key = fm.apply(variables, x, side="key")[:, 0]
  # s = -1 turns the sign of w.y on the key, and conjugation turns it back.
  assert float(jnp.abs(query - key).max()) > 0.1
  flipped = jnp.concatenate([key[:, :32], -key[:, 32:]], axis=-1)
  x_negative = fm.apply(variables, -x, side="query")[:, 0]
  np.testing.assert_allclose(flipped, x_negative, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_diagonal_form_equals_the_dense_formula(case, kernel):
  fm = build_case(case, kernel=kernel)
  query, key = draw_data()
  stats = calibrate(fm)
  variables = fm.init(jax.random.key(0), head_dim=4)
  w = np.asarray(variables.projection["rows"]["w"][0], np.float64)
  parameters = jax.tree.map(lambda leaf: leaf[0, 0], stats["component"])
  rho = np.broadcast_to(np.asarray(parameters["rho"], np.float64), (4,))
  # Rows are turned by the axes that diagonalise A; others by any rotation.
  if "axes" in parameters:
    turn, rows = np.float64(parameters["axes"]), w
  else:
    turn = random_rotation()
    rows = w @ turn.T
  a, b1, b2, c1, c2 = dense_form(
    (1.0 - 1.0 / rho) / 8.0, as_matrix(parameters["query_map"]), turn
  )
  extra = 0.5 * np.eye(4) if kernel == "gaussian" else np.zeros((4, 4))
  for x, side, b, c in ((query, "query", b1, c1), (key, "key", b2, c2)):
    expected = dense_log_features(rows, x, a, b, c - extra)
    out = fm.log_features(
      variables, jnp.asarray(x)[None, :, None, :], side=side, stats=stats
    )
    # float32 features of exponents up to about 10.
    np.testing.assert_allclose(
      out.log_magnitude[0, :, 0] + 0.5 * np.log(16.0), expected, atol=1e-5
    )
  component = case_component(case, kernel=kernel)
  np.testing.assert_allclose(
    component.log_second_moment(
      jnp.asarray(PAIRS[:, 0]),
      jnp.asarray(PAIRS[:, 1]),
      ComponentState({}, {}, parameters),
    ),
    dense_log_second_moment(
      PAIRS[:, 0], PAIRS[:, 1], a, b1, b2, c1 - extra, c2 - extra
    ),
    atol=1e-5,
  )


@pytest.mark.parametrize("case", [*DENSE, "oprf_hyp"])
@pytest.mark.quick_every(6)
def test_constant_and_learned_start_as_oprf_and_train(case):
  x = jnp.asarray(draw_data()[0])[:, None, :]
  constant, learned = (
    build_case(case, statistics=source) for source in ("constant", "learned")
  )
  other = "oprf_hyp" if case == "oprf_hyp" else "oprf"
  oprf = build_case(other, statistics="constant")
  variables = learned.init(jax.random.key(0), head_dim=4)
  assert not constant.info.needs_stats and not learned.info.needs_stats
  expected = oprf.apply(oprf.init(jax.random.key(0), head_dim=4), x, side="key")
  for fm, own in (
    (constant, constant.init(jax.random.key(0), head_dim=4)),
    (learned, variables),
  ):
    np.testing.assert_allclose(
      fm.apply(own, x, side="key"), expected, rtol=1e-5
    )

  def loss(params):
    phi = learned.apply(variables._replace(params=params), x, side="key")
    return jnp.sum(phi * jnp.arange(phi.shape[-1])[None, None, :])

  grads = jax.grad(loss)(variables.params)["component"]
  assert all(float(jnp.abs(g).max()) > 1e-3 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("case", DENSE)
def test_learned_maps_keep_dot_products(case):
  component = case_component(case, statistics="learned")
  params = component.init(jax.random.key(0), 8, num_features=4)
  rngs = jax.random.split(jax.random.key(1), len(params))
  params = {
    name: leaf + 0.5 * jax.random.normal(rng, leaf.shape)
    for rng, (name, leaf) in zip(rngs, params.items(), strict=True)
  }
  parameters = component.from_params(params)
  query_map, key_map = (
    as_matrix(parameters[f"{side}_map"]) for side in ("query", "key")
  )
  assert np.abs(query_map - np.eye(8)).max() > 0.1
  np.testing.assert_allclose(query_map.T @ key_map, np.eye(8), atol=1e-4)


@pytest.mark.parametrize(
  ("kwargs", "error", "words"),
  [
    ({"a": 0.125}, ValueError, "below 1/8"),
    ({"a": 0.2 + 0.1j}, ValueError, "below 1/8"),
    ({"a": float("nan")}, ValueError, "below 1/8"),
    ({"a": -float("inf")}, ValueError, "below 1/8"),
    ({"a": "0.1"}, TypeError, "Python number"),
    ({"a": np.zeros(1)}, TypeError, "Python number"),
    ({"sign": 0}, ValueError, "sign must be 1 or -1"),
    ({"learn": "sigmoide"}, ValueError, "Did you mean 'sigmoid'"),
    ({"a": -0.1 + 0.1j, "learn": "exp"}, ValueError, "must be real"),
    ({"a": 0.05, "learn": "sigmoid"}, ValueError, "cannot start at a=0.05"),
    ({"sign": -1, "learn": "sigmoid"}, ValueError, "cannot start at a=0.0"),
    ({"kernel": "gausian"}, ValueError, "Did you mean 'gaussian'"),
  ],
)
def test_gerf_refuses(kwargs, error, words):
  with pytest.raises(error, match=words):
    build_component("gerf", kwargs)


def test_gerf_facts_follow_its_options():
  positive, signed = (
    case_component("gerf_negative"),
    case_component("gerf_complex"),
  )
  assert (positive.info.positive, positive.info.features) == (True, "M")
  assert (signed.info.positive, signed.info.features) == (False, "2M")
  assert build_component("gerf", {"sign": -1}).info.even
  assert not positive.info.even and not signed.info.even
  assert build_case("gerf_complex") is build_case("gerf_complex")


ANTITHETIC = ("antithetic", "orf_antithetic", "orf_sqrtd_anti", "mm_anti")


@pytest.mark.parametrize("matrix", ANTITHETIC)
@pytest.mark.parametrize("name", ["posrf_hyp", "oprf_hyp", "trigrf", "hrf"])
def test_repeated_rows_warn_once(name, matrix, recwarn):
  with pytest.warns(UserWarning, match=f"^{name}-{matrix} has the variance"):
    sf.feature_map(name, matrix, num_features=19)
  sf.feature_map(name, matrix, num_features=19)
  for other in ("posrf", "oprf", "relu"):
    sf.feature_map(other, matrix, num_features=19)
  assert not recwarn.list


@pytest.mark.parametrize(
  "name", [n for n in sf.list_components() if build_component(n).info.even]
)
def test_even_components_map_a_row_and_its_negative_alike(name):
  component = build_component(name)
  w, x, y = jax.random.normal(jax.random.key(0), (3, 5, 4))
  params = component.init(jax.random.key(1), 4, num_features=5)
  random = component.draw(jax.random.key(2), 5, 4)
  state = ComponentState(params, random, ())
  if component.needs_stats:
    stats = component.solve(component.moments(x, y, None, None))
    state = state._replace(stats=stats)

  def estimate(rows):
    both = []
    for side, z in (("query", x), ("key", y)):
      out = component.log_features(z, WeightSample(rows), side, state)
      factor = 1.0 if out.factor is None else out.factor
      both.append(factor * jnp.exp(out.log_magnitude))
    return both[0] @ both[1].T

  np.testing.assert_allclose(estimate(w), estimate(-w), rtol=1e-4, atol=1e-5)


def fixed_norm_bias(a, x, y):
  """Returns the relative bias of rows of norm sqrt(H), by the 0F1 series."""
  head_dim = x.shape[-1]
  t = np.sum((x + y) ** 2, axis=-1)
  argument = head_dim * (1.0 - 4.0 * a) * t / 4.0
  mean = scipy.special.hyp0f1(head_dim / 2, argument)
  scale = (1.0 - 4.0 * a) ** (head_dim / 2) * np.exp(2.0 * a * head_dim)
  squares = np.sum(x**2 + y**2, axis=-1) / 2.0
  return scale * mean * np.exp(-squares - np.sum(x * y, axis=-1)) - 1.0


@pytest.mark.parametrize("name", ["posrf", "oprf"])
def test_bias_of_fixed_norms_is_the_closed_form(name):
  # At typical inputs oprf is less biased than posrf, not more: no warning.
  options = {} if name == "posrf" else {"statistics": "constant"}
  x, y = np.random.default_rng(0).normal(size=(2, 40, 16)) * 16**-0.25
  fm = sf.feature_map(
    name, "orf_sqrtd", num_features=64, component_kwargs=options
  )
  a = 0.0
  if options:
    a = case_component("gerf_default").coefficients(None, 16).a[0]
  expected = fixed_norm_bias(a, x, y)
  means = {"posrf": -0.37, "oprf": -0.05}
  assert abs(np.mean(expected) - means[name]) < 0.15
  lift = lambda z: jnp.asarray(z, jnp.float32)[:, None, :]

  @jax.jit
  def estimate(rng):
    variables = fm.init(rng, head_dim=16)
    phi, psi = (
      fm.apply(variables, lift(z), side=side)
      for side, z in (("query", x), ("key", y))
    )
    return jnp.sum(phi * psi, axis=-1)[:, 0]

  draws = jax.lax.map(estimate, jax.random.split(jax.random.key(0), 400))
  relative = np.asarray(draws, np.float64) / np.exp(np.sum(x * y, -1)) - 1.0
  error = relative.std(axis=0) / np.sqrt(len(relative))
  scores = (relative.mean(axis=0) - expected) / error
  assert np.all(np.abs(scores) < 4.5), scores
