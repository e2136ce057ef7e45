"""Poisson and geometric features, signed and positive."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import spectraformer_jax as sf
from spectraformer_jax.components import COMPONENTS
from spectraformer_jax.components.discrete_laws import (
  P_RANGE,
  POISSON_TABLE,
  RATE_RANGE,
  geometric_degrees,
  optimal_p,
  poisson_degrees,
)
from spectraformer_jax.weight_matrices import stored_uniforms
from tests.components.helpers import (
  HEAD_DIM,
  PAIRS,
  build,
  calibrate,
  check_mean_and_square,
)

NAMES = ["poisrf", "geomrf", "poisrf_plus", "geomrf_plus"]
PLUS = NAMES[2:]


def draw_data(num_queries=7, num_keys=5, scale=0.5, seed=0):
  """Draws queries and keys with unequal coordinates and means."""
  generator = np.random.default_rng(seed)
  spread = scale * np.array([0.5, 1.0, 1.5, 0.8])
  draw = lambda n, mean: mean + spread * generator.normal(size=(n, HEAD_DIM))
  return (
    draw(num_queries, 0.1).astype(np.float32),
    draw(num_keys, -0.2).astype(np.float32),
  )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.quick_every(8)
def test_mean_and_square_with_statistics_of_the_pairs(name, kernel):
  fm = build(name, kernel=kernel)
  stats = calibrate(fm, PAIRS[:, 0], PAIRS[:, 1])
  check_mean_and_square(fm, 20_000, stats)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.quick_every(3)
def test_mean_and_square_with_a_constant(name):
  check_mean_and_square(build(name, statistics="constant"), 20_000)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.quick_every(4)
def test_mean_and_square_with_learned_parameters(name):
  # Moved off their start; the shift of the plus forms then has coordinates on
  # both sides.
  move = lambda variables: variables._replace(
    params=jax.tree.map(lambda leaf: leaf + 0.2, variables.params)
  )
  check_mean_and_square(build(name, statistics="learned"), 20_000, change=move)


@pytest.mark.parametrize("name", PLUS)
@pytest.mark.quick_every(2)
def test_plus_stays_unbiased_where_running_minima_are_no_bounds(name):
  fm = build(name, statistics="ema")
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  halves = [jnp.asarray(PAIRS[:, side, None, None, :]) for side in (0, 1)]
  moments = fm.moments(variables, *halves)
  mean = jax.tree.map(lambda leaf: jnp.mean(leaf, 0, keepdims=True), moments)
  stats = fm.solve(mean)
  phi = fm.apply(variables, halves[0], side="query", stats=stats)
  powers = halves[0][:, 0, 0] - stats["component"]["shift"][0]
  assert bool((powers < 0.0).any()), "the case has coordinates below the shift"
  assert not fm.info.positive and bool(jnp.isfinite(phi).all())
  # At p = .97, geomrf_plus has most of its mean square from counts that are too
  # rare for so many draws.
  squares = name == "poisrf_plus"
  check_mean_and_square(fm, 20_000, stats, squares=squares)


@pytest.mark.parametrize("name", PLUS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 30.0])
@pytest.mark.quick_every(6)
def test_plus_is_positive_with_statistics_of_its_data(name, scale):
  fm = build(name, num_features=64)
  query, key = draw_data(scale=scale)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  stats = calibrate(fm, query, key)
  for side, x in (("query", query), ("key", key)):
    out = fm.log_features(
      variables, jnp.asarray(x)[:, None], side=side, stats=stats
    )
    np.testing.assert_array_equal(out.factor, 1.0)
    assert bool(jnp.isfinite(out.log_magnitude).all())


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.quick_every(2)
def test_signs_are_those_of_the_product(name):
  # Against the formula as it is written, in float64.
  fm = build(name, num_features=200)
  query, key = draw_data()
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  stats = calibrate(fm, query, key)
  query[0, 1] = 0.0  # 0^0 is 1.
  uniform = np.asarray(variables.projection["rows"]["w"][0], np.float64) + 0.5
  uniform /= 2.0**23
  own = {k: float(v[0, 0]) for k, v in stats["component"].items()}
  if name == "poisrf":
    rate = own["rate"]
    n = scipy.stats.poisson.ppf(uniform, rate)
    weight = np.exp(0.5 * rate * HEAD_DIM) * rate ** (-0.5 * n.sum(-1))
  else:
    p = own["p"]
    n = scipy.stats.geom.ppf(uniform, p) - 1
    weight = p ** (-0.5 * HEAD_DIM) * (1.0 - p) ** (-0.5 * n.sum(-1))
    weight /= np.sqrt(scipy.special.factorial(n).prod(-1))
  expected = weight * np.prod(query[:, None].astype(float) ** n, axis=-1)
  out = fm.apply(variables, query[:, None], side="query", stats=stats)[:, 0]
  assert (expected < 0).any() and n.max() >= 2
  np.testing.assert_allclose(out, expected / np.sqrt(200), rtol=2e-4, atol=1e-9)


def test_the_rate_minimises_the_mean_log_second_moment():
  query, key = draw_data(50, 40)
  fm = build("poisrf")
  rate = float(calibrate(fm, query, key)["component"]["rate"][0, 0])
  product = np.square(query[:, None].astype(float) * key[None].astype(float))
  objective = lambda rate: np.mean(
    rate * HEAD_DIM + np.sum(product, axis=-1) / rate
  )
  factors = np.exp(np.random.default_rng(1).normal(0.0, 0.3, 100))
  assert all(objective(rate) <= objective(rate * f) for f in factors)
  # A minimum of a function that is not flat: 10 % off costs at least 0.2 %.
  assert objective(1.1 * rate) > 1.002 * objective(rate)


@pytest.mark.parametrize("scale", [0.02, 0.3, 1.0, 5.0, 30.0])
def test_p_is_the_minimum_of_a_fine_grid(scale):
  product = scale**2 * np.array([0.2, 0.5, 0.9, 1.3])

  def objective(p):
    argument = 2.0 * product / np.sqrt(1.0 - p)[:, None]
    bessel = np.log(scipy.special.i0e(argument)) + argument
    return np.sum(bessel, axis=-1) - HEAD_DIM * np.log(p)

  p = float(optimal_p(jnp.asarray(product, jnp.float32)))
  low, high = (math.log(p / (1.0 - p)) for p in P_RANGE)
  grid = 1.0 / (1.0 + np.exp(-np.linspace(low, high, 200_001)))
  values = objective(grid)
  best = grid[values.argmin()]
  # The parabola's error: a hundredth of the step of the coarse grid, 0.2.
  np.testing.assert_allclose(
    np.log(p / (1 - p)), np.log(best / (1 - best)), atol=0.02
  )
  assert objective(np.array([p]))[0] - values.min() < 2e-4
  if scale > 0.1:  # Below, the minimum is at the end of the range.
    neighbours = objective(1 / (1 + (1 / p - 1) * np.exp([0.1, -0.1])))
    assert np.all(neighbours > objective(np.array([p]))[0])


def test_p_is_best_for_a_single_pair():
  fm = build("geomrf")
  x, y = (jnp.asarray(PAIRS[2, side]) for side in (0, 1))
  stats = calibrate(fm, PAIRS[2, :1], PAIRS[2, 1:])
  p = float(stats["component"]["p"][0, 0])
  moment = lambda p: float(fm.component.log_pair_moment(x * y, {"p": p}))
  logits = np.log(p / (1 - p)) + np.random.default_rng(0).normal(0, 0.5, 100)
  assert all(moment(p) < moment(1 / (1 + np.exp(-z))) + 1e-5 for z in logits)


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.3, 1.0, 7.0, 32.0])
def test_poisson_degrees_are_quantiles(rate):
  bits = stored_uniforms.draw(jax.random.key(0), (50_000,))
  bits = jnp.concatenate([bits, jnp.array([0, 2**23 - 1], jnp.int32)])
  uniform = stored_uniforms.to_uniform(bits)
  assert 0.0 < float(uniform.min()) and float(uniform.max()) < 1.0
  counts = np.asarray(jax.jit(poisson_degrees)(uniform, rate))
  expected = scipy.stats.poisson.ppf(np.asarray(uniform, np.float64), rate)
  # A uniform within rounding of a step may fall to its other side.
  assert np.mean(counts != expected) < 1e-4
  np.testing.assert_allclose(counts, expected, atol=1.0)
  np.testing.assert_array_equal(counts[-2:], expected[-2:])


def test_the_poisson_table_is_long_enough():
  largest = scipy.stats.poisson.isf(2.0**-24, RATE_RANGE[1])
  assert largest < POISSON_TABLE


@pytest.mark.parametrize("p", [1e-3, 0.2, 0.7, 0.999])
def test_geometric_degrees_are_quantiles(p):
  uniform = stored_uniforms.to_uniform(
    stored_uniforms.draw(jax.random.key(0), (50_000,))
  )
  counts = np.asarray(jax.jit(geometric_degrees)(uniform, p))
  p = np.float64(np.float32(p))
  expected = scipy.stats.geom.ppf(np.asarray(uniform, np.float64), p) - 1
  assert np.mean(counts != expected) < 1e-3
  np.testing.assert_allclose(counts, expected, atol=1.0)


@pytest.mark.parametrize("matrix", ["iid", "lhs", "qmc"])
@pytest.mark.quick_every(2)
def test_stored_uniforms_keep_their_bits_in_bfloat16(matrix):
  fm = build("poisrf", matrix, num_features=16, statistics="constant")
  rng = jax.random.key(3)
  full = fm.init(rng, head_dim=HEAD_DIM)
  half = fm.init(rng, head_dim=HEAD_DIM, dtype=jnp.bfloat16)
  w = half.projection["rows"]["w"]
  np.testing.assert_array_equal(w, full.projection["rows"]["w"])
  assert int(w.min()) >= 0 and int(w.max()) < 2**23
  if matrix != "iid":
    # One row in each sixteenth of every coordinate.
    cells = np.sort(np.asarray(w[0]) // 2**19, axis=0)
    np.testing.assert_array_equal(cells, np.arange(16)[:, None] * [[1] * 4])


@pytest.mark.parametrize("name", NAMES)
def test_statistics_honour_masks_and_unequal_lengths(name):
  fm = build(name)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  query, key = (jnp.asarray(x)[None, :, None, :] for x in draw_data(7, 5))
  query_mask = jnp.arange(7)[None, :] < 4
  key_mask = jnp.arange(5)[None, :] < 3
  poison = lambda x, mask: jnp.where(mask[:, :, None, None], x, -1e9)
  masked = fm.calibrate(
    variables,
    poison(query, query_mask),
    poison(key, key_mask),
    query_mask=query_mask,
    key_mask=key_mask,
  )
  sliced = fm.calibrate(variables, query[:, :4], key[:, :3])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), masked, sliced
  )
  hidden = fm.calibrate(
    variables,
    query,
    key,
    query_mask=query_mask & False,
    key_mask=key_mask & False,
  )
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(hidden))
  gradient = jax.grad(
    lambda query: sum(
      jnp.sum(leaf)
      for leaf in jax.tree.leaves(fm.calibrate(variables, query, key))
    )
  )(query)
  np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.quick_every(4)
def test_learned_starts_at_the_constant_and_has_gradients(name):
  constant, learned = (
    build(name, num_features=32, statistics=s) for s in ("constant", "learned")
  )
  x = jnp.asarray(PAIRS[:, :1])
  rng = jax.random.key(0)
  variables = learned.init(rng, head_dim=HEAD_DIM)
  np.testing.assert_allclose(
    constant.apply(constant.init(rng, head_dim=HEAD_DIM), x, side="key"),
    learned.apply(variables, x, side="key"),
    rtol=1e-4,
    atol=1e-7,
  )
  grads = jax.grad(
    lambda params: jnp.sum(
      learned.apply(variables._replace(params=params), x, side="key")
    )
  )(variables.params)
  assert len(jax.tree.leaves(grads)) == (2 if name in PLUS else 1)
  assert all(float(jnp.abs(g).min()) > 0 for g in jax.tree.leaves(grads))


def test_constant_is_the_closed_form_of_unit_variance_data():
  head_dim = 16
  shape = (200_000, head_dim)
  query, key = jax.random.normal(jax.random.key(0), (2, *shape))
  query, key = (x * head_dim**-0.25 for x in (query, key))
  for name in NAMES[:2]:
    component = COMPONENTS.build(name)
    moments = component.moments(query, key, None, None)
    for leaf, expected in zip(
      jax.tree.leaves(component.solve(moments)),
      jax.tree.leaves(component.constant(head_dim)),
      strict=True,
    ):
      np.testing.assert_allclose(leaf, expected, rtol=1e-2)


@pytest.mark.slow
def test_gradients_are_those_of_the_power():
  # d/dx of the estimate, away from 0; and finite at 0.
  fm = build("poisrf", num_features=50_000, statistics="constant")
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  x, y = (jnp.asarray(PAIRS[0, side]) for side in (0, 1))
  psi = fm.apply(variables, y[None, None], side="key")[0, 0]
  estimate = lambda x: jnp.sum(
    psi * fm.apply(variables, x[None, None], side="query")[0, 0]
  )
  gradient = jax.grad(estimate)(x)
  expected = y * jnp.exp(jnp.sum(x * y))
  # Deviation of 50 000 draws: 0.01 to 0.02 in each coordinate.
  np.testing.assert_allclose(gradient, expected, atol=0.06)
  assert bool(jnp.isfinite(jax.grad(estimate)(x.at[1].set(0.0))).all())
  assert bool(jnp.isfinite(jax.grad(estimate)(x.at[1].set(1e-20))).all())


def test_errors():
  with pytest.raises(ValueError, match="needs rows of law 'poisson'.*'orf'"):
    build("poisrf", "orf")
  with pytest.raises(ValueError, match="needs rows of law 'geometric'"):
    build("geomrf_plus", "mm")
  with pytest.raises(ValueError, match="Did you mean 'batch'"):
    build("geomrf", statistics="bach")
  with pytest.raises(ValueError, match="Did you mean 'gaussian'"):
    build("poisrf", kernel="gausian")
  fm = build("poisrf")
  variables = fm.init(jax.random.key(0), head_dim=4)
  x = jnp.ones((1, 3, 1, 4))
  with pytest.raises(ValueError, match=r"pass stats=fm\.calibrate"):
    fm.apply(variables, x, side="key")
  with pytest.raises(ValueError, match="'learned' or 'constant'"):
    sf.spectral_attention(
      x, x, x, feature_map=fm, variables=variables, is_causal=True
    )


def reference_attention(fm, query, key, value, uniform, own):
  """Computes attention ``[T, V]`` as in the paper, in float64.

  Degrees and parameters are the component's, computed in float32.
  """
  counts = np.float64(jax.jit(fm.component.degrees)(uniform, own))
  own = {name: np.float64(leaf) for name, leaf in own.items()}
  head_dim = query.shape[-1]
  if "rate" in own:
    rate = own["rate"]
    row = 0.5 * (rate * head_dim - np.log(rate) * counts.sum(-1))
  else:
    log_factorials = scipy.special.gammaln(counts + 1.0)
    terms = log_factorials + np.log1p(-own["p"]) * counts + np.log(own["p"])
    row = -0.5 * terms.sum(-1)
  shift = own["shift"]
  log_phi, log_psi = (
    row
    + np.log(x - shift) @ counts.T
    + ((x - 0.5 * shift) * shift).sum(-1, keepdims=True)
    for x in (np.float64(query), np.float64(key))
  )
  most = log_psi.max(axis=0)
  log_phi = log_phi + most
  log_phi -= log_phi.max(axis=-1, keepdims=True)
  weights = np.exp(log_phi) @ np.exp(log_psi - most).T
  return weights @ np.float64(value) / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
  ("name", "limit"), [("poisrf_plus", 4e-5), ("geomrf_plus", 7e-5)]
)
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.quick_every(4)
def test_large_norms_stay_accurate(name, limit, head_dim):
  # T11: |x|^2 about 200, where log-features are sums of the order of a
  # thousand, or ten thousand (geometric, head_dim 8). The limits are below the
  # 1e-4 asked for: sums that are not split reach 5e-5 and 1.0e-4 here.
  fm = build(name, num_features=128)
  rngs = jax.random.split(jax.random.key(1), 4)
  query, key, value = (
    jax.random.normal(rng, (24, 20, 1, head_dim)) for rng in rngs[:3]
  )
  query, key = (
    a * jnp.sqrt(200.0 / jnp.mean(jnp.sum(a**2, -1))) for a in (query, key)
  )
  variables = fm.init(rngs[3], head_dim=head_dim)
  stats = fm.calibrate(variables, query, key)
  out = sf.spectral_attention(
    query,
    key,
    value,
    feature_map=fm,
    variables=variables,
    stats=stats,
    scale=1.0,
  )
  uniform = stored_uniforms.to_uniform(variables.projection["rows"]["w"][0])
  for i in range(len(query)):
    own = {name: leaf[i, 0] for name, leaf in stats["component"].items()}
    expected = reference_attention(
      fm, query[i, :, 0], key[i, :, 0], value[i, :, 0], uniform, own
    )
    error = np.abs(out[i, :, 0] - expected).max() / np.abs(expected).max()
    assert error < limit, i


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("name", PLUS)
@pytest.mark.quick_every(3)
def test_no_query_has_negative_weights(name, kernel):
  # Queries below every visible key, at positions with and without a key.
  fm = build(name, kernel=kernel)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  query, key = jax.random.normal(jax.random.key(1), (2, 1, 9, 1, HEAD_DIM))
  mask = jnp.arange(9)[None, :] < 4
  weights = sf.implied_attention_weights(
    3.0 * query - 1.0, key, feature_map=fm, variables=variables, key_mask=mask
  )
  assert float(weights.min()) >= 0.0
  np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-4)


def relative_bias(law, parameter, product):
  """Returns the relative bias of one coordinate, from all stored uniforms."""
  bits = jnp.arange(2**stored_uniforms.NUM_BITS, dtype=jnp.int32)
  counts_of = poisson_degrees if law == "poisson" else geometric_degrees
  counts = jax.lax.map(
    lambda bits: counts_of(stored_uniforms.to_uniform(bits), parameter),
    bits.reshape(64, -1),
  )
  n, times = np.unique(np.asarray(counts), return_counts=True)
  log_factorial = scipy.special.gammaln(n + 1.0)
  if law == "poisson":
    value = np.exp(parameter - n * np.log(parameter))
  else:
    value = np.exp(-np.log(parameter) - n * np.log1p(-parameter))
    value *= np.exp(-log_factorial)
  mean = np.sum(times * value * product**n) / times.sum()
  return mean / np.exp(product) - 1.0


@pytest.mark.parametrize(
  ("law", "parameter", "product", "bound"),
  [
    ("poisson", RATE_RANGE[0], 1.0, 0.04),
    ("geometric", P_RANGE[1], 1.0, 0.025),
    ("geometric", P_RANGE[0], 1.0, 1e-3),
    ("poisson", 0.1, 1.0, 1e-3),
    ("poisson", RATE_RANGE[1], 1.0, 1e-3),
    ("poisson", RATE_RANGE[1], -1.0, 3e-3),
    ("geometric", 0.2, 1.0, 1e-3),
    ("geometric", 0.9, 1.0, 1e-3),
    ("geometric", 0.9, 4.0, 0.06),
  ],
)
@pytest.mark.quick_every(3)
def test_stored_uniforms_resolve_the_range_of_parameters(
  law, parameter, product, bound
):
  assert abs(relative_bias(law, parameter, product)) < bound
