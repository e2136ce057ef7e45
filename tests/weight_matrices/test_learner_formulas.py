"""Each learner against its formula, at random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import spectraformer_jax as sf
from spectraformer_jax import weight_matrices
from spectraformer_jax.weight_matrices.pieces import haar, hadamard
from spectraformer_jax.weight_matrices.rotations import (
  haar_reflections,
  reflections,
)
from spectraformer_jax.weight_matrices.splines import (
  identity_increments,
  monotone_spline,
)
from tests.helpers import PAIRS, estimates, standard_scores
from tests.weight_matrices.helpers import (
  compiled_init_and_draw,
  compiled_rows,
  draw_initial_rows,
  draw_learner_rows,
  quick_jit,
  randomise,
)


def mixture_kernels(pi, mu, sigma, pairs, component):
  """The closed form for a mixture of diagonal Gaussians, float64: ``[P]``."""
  x, y = np.asarray(pairs[:, 0], float), np.asarray(pairs[:, 1], float)
  if component == "trigrf":  # the Gaussian kernel's map
    z = x - y
    terms = np.cos(z @ mu.T) * np.exp(-0.5 * (z**2) @ (sigma**2).T)
  else:
    v, squares = x + y, np.sum(x**2 + y**2, axis=1, keepdims=True)
    terms = np.exp(v @ mu.T + 0.5 * (v**2) @ (sigma**2).T - 0.5 * squares)
  return terms @ pi


def gaussian_map(component, matrix, num_features):
  """The pair; a trigonometric map of the Gaussian kernel."""
  kwargs = {"kernel": "gaussian"} if component == "trigrf" else {}
  name, options = matrix
  return sf.feature_map(
    component,
    name,
    num_features=num_features,
    component_kwargs=kwargs,
    weight_matrix_kwargs=options,
  )


@pytest.mark.parametrize("component", ["trigrf", "posrf"])
@pytest.mark.parametrize("components", [1, 3])
def test_gmm_estimates_the_kernel_of_its_mixture(components, component):
  # 8 rows: shares of 3, 3 and 2.
  options = {"num_components": components, "base": "iid"}
  fm = gaussian_map(component, ("gmm", options), 8)
  variables = fm.init(jax.random.key(0), head_dim=4)
  variables = variables._replace(params=randomise(variables.params))
  params = jax.tree.map(lambda leaf: leaf[0], variables.params["rows"])
  pi = np.ones(1)
  if components > 1:
    pi = np.exp(np.asarray(params["logits"], float))
    pi /= pi.sum()
    assert np.ptp(pi) > 0.1
  # The soft clip, in float64.
  raw = np.asarray(params["log_sigma"], float)
  bound = np.where(raw < 0.0, -3.0, 1.0)
  sigma = np.exp(bound * np.tanh(raw / bound))
  expected = mixture_kernels(
    pi, np.asarray(params["mu"], float), sigma, PAIRS, component
  )
  samples = estimates(fm, jax.random.key(1), PAIRS, 4000, variables=variables)
  scores = standard_scores(samples, expected)
  assert np.abs(scores).max() < 4.0, scores


@pytest.mark.parametrize("component", ["trigrf", "posrf"])
def test_cov_estimates_the_kernel_of_its_covariance(component):
  fm = gaussian_map(component, ("cov", {"base": "iid"}), 8)
  variables = fm.init(jax.random.key(0), head_dim=4)
  variables = variables._replace(params=randomise(variables.params))
  lower = np.zeros((4, 4))
  lower[np.tril_indices(4)] = variables.params["rows"]["lower"][0]
  diagonal = np.log1p(np.exp(np.diag(lower)))
  factor = np.tril(lower, -1) + np.diag(diagonal)
  x, y = (np.asarray(PAIRS[:, side], float) for side in range(2))
  if component == "trigrf":
    expected = np.exp(-0.5 * np.sum(((x - y) @ factor) ** 2, axis=1))
  else:
    squares = np.sum(x**2 + y**2, axis=1)
    v = (x + y) @ factor
    expected = np.exp(0.5 * np.sum(v**2, axis=1) - 0.5 * squares)
  samples = estimates(fm, jax.random.key(1), PAIRS, 4000, variables=variables)
  scores = standard_scores(samples, expected)
  assert np.abs(scores).max() < 4.0, scores


def test_gmm_weights_are_the_shares():
  matrix = weight_matrices.GMM(num_components=3)
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  params = randomise(params)
  weights = np.exp(compiled_rows(matrix, params, projection).log_weight) / 13
  # 13 rows: shares of 5, 4 and 4.
  np.testing.assert_allclose(
    [weights[:5].sum(), weights[5:9].sum(), weights[9:].sum()],
    jax.nn.softmax(params["logits"]),
    rtol=1e-5,
  )


def test_gmm_bounds_its_scales():
  matrix = weight_matrices.GMM(min_log_sigma=-0.5, max_log_sigma=0.2)
  params, _ = compiled_init_and_draw(matrix, 13, 6)
  for value, log_bound in ((-20.0, -0.5), (20.0, 0.2)):
    params["log_sigma"] = jnp.full((4, 6), value)
    np.testing.assert_allclose(
      matrix.sigma(params), np.exp(log_bound), rtol=1e-6
    )


def test_generator_is_noise_plus_its_network():
  matrix = weight_matrices.Generator(num_hidden=1)
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  params = randomise(params)
  hidden = projection["w"] @ params["layer_0"]["kernel"]
  hidden = jax.nn.gelu(hidden + params["layer_0"]["bias"][None])
  out = hidden @ params["layer_1"]["kernel"] + params["layer_1"]["bias"][None]
  np.testing.assert_allclose(
    compiled_rows(matrix, params, projection).w,
    projection["w"] + out,
    rtol=1e-4,
    atol=1e-5,
  )
  # Rows are made apart.
  alone = matrix.transform(params, projection["w"][:1])
  np.testing.assert_allclose(
    alone, compiled_rows(matrix, params, projection).w[:1], rtol=1e-5, atol=1e-6
  )


def test_spline_starts_as_the_identity():
  for knots in (np.linspace(-4.0, 4.0, 17), np.array([0.0, 0.1, 2.0, 9.0])):
    x = jnp.linspace(-30.0, 30.0, 1001)
    y = monotone_spline(
      x, knots, jnp.float32(knots[0]), identity_increments(knots)
    )
    # Sums of up to 16 rounded increments.
    np.testing.assert_allclose(y, x, atol=1e-5)


def test_spline_goes_through_its_values_and_increases():
  knots = np.linspace(-4.0, 4.0, 17)
  start = jnp.float32(-1.5)
  increments = 3.0 * jax.random.normal(jax.random.key(0), (16,))
  spline = lambda x: monotone_spline(x, knots, start, increments)
  values = start + np.append(0.0, np.cumsum(jax.nn.softplus(increments)))
  np.testing.assert_allclose(
    spline(jnp.asarray(knots, jnp.float32)), values, rtol=1e-5, atol=1e-5
  )
  middles = 0.5 * (knots[1:] + knots[:-1])
  np.testing.assert_allclose(
    spline(jnp.asarray(middles, jnp.float32)),
    0.5 * (values[1:] + values[:-1]),
    rtol=1e-5,
    atol=1e-5,
  )
  outside = spline(jnp.array([-7.0, 6.5]))
  np.testing.assert_allclose(
    outside, [values[0] - 3.0, values[-1] + 2.5], rtol=1e-5
  )
  x = jnp.linspace(-6.0, 6.0, 400)
  assert (jnp.diff(spline(x)) > 0.0).all()


def test_bbq_has_one_quantile_function_per_coordinate():
  matrix = weight_matrices.BBQ(num_pieces=5)
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  params = randomise(params, scale=2.0)
  w, noise = compiled_rows(matrix, params, projection).w, projection["w"]
  for j in (0, 5):
    own = monotone_spline(
      noise[:, j],
      np.linspace(-4.0, 4.0, 6),
      params["start"][j],
      params["increments"][:, j],
    )
    np.testing.assert_allclose(w[:, j], own, rtol=1e-5, atol=1e-5)
    order = np.argsort(noise[:, j])
    assert (np.diff(w[order, j]) > 0.0).all()
  assert not np.allclose(params["increments"][:, 0], params["increments"][:, 5])


def test_bbq_estimates_a_product_of_its_laws():
  # E cos(w.z) = Re prod_j E exp(i w_j z_j), each by a fine grid of quantiles.
  matrix = weight_matrices.BBQ()
  params, _ = compiled_init_and_draw(matrix, 13, 6)
  params = randomise(params, scale=1.0)
  u = (np.arange(20000) + 0.5) / 20000
  grid = np.repeat(stats.norm.ppf(u)[:, None], 6, axis=1)
  q = np.asarray(matrix.transform(params, jnp.asarray(grid, jnp.float32)))
  z = np.array([0.5, -0.4, 0.3, 0.2, -0.1, 0.2])
  expected = np.prod(np.mean(np.exp(1j * q * z), axis=0)).real
  rows, _ = draw_learner_rows(matrix, params, 13, 6, 3000)
  samples = np.cos(rows @ z).mean(axis=1, keepdims=True)
  assert abs(standard_scores(samples, np.array([expected]))[0]) < 4.0


@pytest.mark.parametrize("head_dim", [2, 5])
def test_flow_is_invertible_with_its_determinant(head_dim):
  matrix = weight_matrices.Flow(num_couplings=3)
  params, projection = compiled_init_and_draw(matrix, 13, head_dim)
  params = randomise(params)
  noise = projection["w"]

  @quick_jit
  def everything(noise):
    w, log_det = matrix.forward(params, noise)
    back, forth = matrix.inverse(params, w), matrix.inverse(params, noise)
    jacobians = jax.vmap(
      jax.jacobian(lambda row: matrix.transform(params, row[None])[0])
    )(noise)
    return w, log_det, back, matrix.transform(params, forth), jacobians

  w, log_det, back, forth, jacobians = everything(noise)
  assert not np.allclose(w, noise, atol=0.3)
  # float32: values of size 10, scaled by up to exp(3 * 1.5) and back.
  np.testing.assert_allclose(back, noise, atol=1e-4)
  np.testing.assert_allclose(forth, noise, atol=1e-4)
  expected = np.linalg.slogdet(np.asarray(jacobians, np.float64))[1]
  np.testing.assert_allclose(log_det, expected, atol=1e-3, rtol=1e-4)


def test_flow_inverse_is_exact_at_the_start():
  matrix = weight_matrices.Flow()
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  w = compiled_rows(matrix, params, projection).w
  np.testing.assert_array_equal(w, projection["w"])
  inverse, kl = quick_jit(matrix.inverse), quick_jit(matrix.kl)
  np.testing.assert_array_equal(inverse(params, w), w)
  assert kl(params, projection) == 0.0


def test_flow_moves_every_coordinate():
  matrix = weight_matrices.Flow(num_couplings=2)
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  moved = matrix.rows(randomise(params), projection).w != projection["w"]
  assert moved.all()


def test_flow_kl_is_that_of_its_law():
  # Biases alone: w is N(shift, diag(scale^2)).
  matrix = weight_matrices.Flow(num_couplings=2)
  params, _ = compiled_init_and_draw(matrix, 13, 6)
  raw, shift = jnp.array([0.4, -0.3, 0.1]), jnp.array([0.5, -0.2, 0.3])
  for coupling in params.values():
    coupling["layer_1"]["bias"] = jnp.concatenate([raw, shift])
  log_scale = 1.5 * np.tanh(np.asarray(raw, float) / 1.5)
  scale = np.exp(np.tile(log_scale, 2))
  mean = np.tile(np.asarray(shift, float), 2)
  expected = 0.5 * np.sum(scale**2 + mean**2 - 1.0 - 2.0 * np.log(scale))

  @quick_jit
  @jax.vmap
  def kl(rng):
    return matrix.kl(params, matrix.draw(rng, 13, 6, None))

  samples = np.asarray(kl(jax.random.split(jax.random.key(1), 2000)))
  scores = standard_scores(samples[:, None], np.array([expected]))
  assert abs(scores[0]) < 4.0


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 100.0])
def test_reflections_are_orthogonal_for_any_vectors(scale):
  vectors = scale * jax.random.normal(jax.random.key(0), (3, 15, 16))
  q = np.asarray(reflections(vectors))
  # 15 products in float32.
  np.testing.assert_allclose(
    np.einsum("bij,bkj->bik", q, q),
    np.broadcast_to(np.eye(16), q.shape),
    atol=1e-5,
  )
  one = np.asarray(vectors[0], np.float64)
  expected = np.eye(16)
  for v in one:
    if scale:
      expected = expected @ (np.eye(16) - 2.0 * np.outer(v, v) / (v @ v))
  np.testing.assert_allclose(q[0], expected, atol=1e-5)


def test_learned_orf_is_orthogonal_for_any_parameters():
  matrix = weight_matrices.LearnedORF()
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  params = randomise(params, scale=3.0)
  w = np.asarray(compiled_rows(matrix, params, projection).w)
  norms = np.asarray(jax.nn.softplus(params["rho"]))
  for start in (0, 6, 12):
    block = w[start : start + 6]
    gram = np.diag(norms[start : start + 6] ** 2)
    np.testing.assert_allclose(block @ block.T, gram, atol=1e-4)
  # A zero vector reflects nothing, with a finite gradient.
  zero = params["v"].at[0, 2].set(0.0)

  def loss(v):
    return jnp.sum(jnp.sin(matrix.rows({**params, "v": v}, projection).w))

  value, gradient = quick_jit(jax.value_and_grad(loss))(zero)
  assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def rotation_statistics(q):
  """Numbers that tell laws of orthogonal matrices apart."""
  q = np.asarray(q, np.float64)
  return {
    "first": q[:, 0, 0],
    "off": q[:, 1, 0],
    "last": q[:, -1, -1],
    "trace": np.trace(q, axis1=1, axis2=2),
    "trace of square": np.einsum("rij,rji->r", q, q),
    "determinant": np.sign(np.linalg.det(q)),
    "sum": q.sum(axis=(1, 2)),
    "product": q[:, 0, 0] * q[:, 1, 1],
  }


def least_p_value(q, reference):
  """Two-sample KS over all statistics."""
  a, b = rotation_statistics(q), rotation_statistics(reference)
  return min(stats.ks_2samp(a[name], b[name]).pvalue for name in a)


def test_learned_orf_starts_as_haar():
  count, dim = 20000, 5
  vectors = haar_reflections(jax.random.key(0), count, dim)
  signs = jax.random.rademacher(jax.random.key(1), (count, dim), jnp.float32)
  reference = haar(jax.random.key(2), count, dim)
  q = reflections(vectors) * signs[:, None, :]
  assert least_p_value(q, reference) > 1e-4
  # The test has power: unsigned, or from plain Gaussian vectors, it is not.
  assert least_p_value(reflections(vectors), reference) < 1e-9
  plain = jax.random.normal(jax.random.key(3), vectors.shape)
  plain = reflections(plain) * signs[:, None, :]
  assert least_p_value(plain, reference) < 1e-9
  entry = np.asarray(q)[:, 2, 3]
  # An entry of a Haar matrix squared: Beta(1/2, (d - 1)/2).
  assert stats.kstest(entry**2, stats.beta(0.5, 2.0).cdf).pvalue > 1e-4


def test_learned_radial_changes_norms_alone():
  matrix = weight_matrices.LearnedRadial(num_pieces=6)
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  params = randomise(params, scale=2.0)
  noise = np.asarray(projection["w"], np.float64)
  w = np.asarray(compiled_rows(matrix, params, projection).w, np.float64)
  old, new = np.linalg.norm(noise, axis=1), np.linalg.norm(w, axis=1)
  np.testing.assert_allclose(w / new[:, None], noise / old[:, None], atol=1e-5)
  assert (np.diff(new[np.argsort(old)]) > 0.0).all()
  assert not np.allclose(old, new, rtol=0.1)


@pytest.mark.parametrize("head_dim", [1, 4, 9, 64, 256])
def test_radial_knots_surround_the_norms(head_dim):
  knots = weight_matrices.LearnedRadial()._knots(head_dim)
  assert knots[0] == 0.0 and (np.diff(knots) > 0.0).all()
  chi = stats.chi(head_dim)
  assert chi.cdf(knots[1]) < 0.3 and chi.sf(knots[-1]) < 1e-4
  # Most knots lie where norms are.
  assert np.sum((knots > chi.ppf(1e-5)) & (knots < chi.isf(1e-5))) >= 9


def test_fastfood_learnable_is_its_formula():
  matrix = weight_matrices.FastFoodLearnable()
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  params = randomise(params)
  h = np.asarray(hadamard(8), np.float64)
  blocks = []
  for block in range(2):
    g, b = (np.asarray(params[name][block], float) for name in ("g", "b"))
    order = np.asarray(projection["permutation"][block])
    assert sorted(order) == list(range(8))
    p = np.eye(8)[order]
    b = np.append(b, np.zeros(2))
    blocks.append(np.sqrt(8.0) * h @ np.diag(g) @ p @ h @ np.diag(b))
  stacked = np.concatenate(blocks)[:13, :6]
  expected = np.asarray(params["s"], float)[:, None] * stacked
  w = compiled_rows(matrix, params, projection).w
  np.testing.assert_allclose(w, expected, rtol=1e-4, atol=1e-5)


def test_fastfood_learnable_starts_with_the_law_of_fastfood():
  count, num_rows, head_dim = 3000, 13, 6
  learnt, _ = draw_initial_rows(
    weight_matrices.FastFoodLearnable(), num_rows, head_dim, count
  )
  fixed, _ = draw_initial_rows(
    weight_matrices.FastFood(), num_rows, head_dim, count
  )
  for i, j in ((0, 1), (0, 7), (3, 5), (0, 8), (12, 9)):
    a, b = (
      np.einsum("rh,rh->r", w[:, i], w[:, j])
      / np.linalg.norm(w[:, i], axis=1)
      / np.linalg.norm(w[:, j], axis=1)
      for w in (learnt, fixed)
    )
    assert stats.ks_2samp(a, b).pvalue > 1e-4, (i, j)
  # The last one sees the permutation: without it these entries are equal, but
  # for the norms of their rows.
  for statistic in (
    lambda w: np.sum(w**2, axis=(1, 2)),
    lambda w: np.log(np.abs(w[:, 0, 0] / w[:, 1, 1])),
  ):
    assert stats.ks_2samp(statistic(learnt), statistic(fixed)).pvalue > 1e-4


def test_free_rows_and_weights_are_the_parameters():
  fm = sf.feature_map("posrf", "free", num_features=7)
  variables = fm.init(jax.random.key(0), head_dim=4)
  params = randomise(variables.params)
  x, y = np.asarray(PAIRS[:, 0], float), np.asarray(PAIRS[:, 1], float)
  phi, psi = (
    fm.apply(variables._replace(params=params), z[:, None], side=side)[:, 0]
    for z, side in ((PAIRS[:, 0], "query"), (PAIRS[:, 1], "key"))
  )
  w, log_weight = (
    np.asarray(params["rows"][name][0], float) for name in ("w", "log_weight")
  )
  terms = np.exp(log_weight + (x + y) @ w.T)
  norms = np.exp(-0.5 * np.sum(x**2 + y**2, axis=1))
  np.testing.assert_allclose(
    np.sum(phi * psi, axis=-1), norms * terms.mean(axis=1), rtol=1e-5
  )


def test_free_rows_start_as_those_of_their_base_in_the_size_that_is_asked():
  half, whole = (
    compiled_init_and_draw(weight_matrices.Free(scale=scale), 7, 4)[0]
    for scale in (0.5, 1.0)
  )
  np.testing.assert_allclose(half["w"], 0.5 * whole["w"], rtol=1e-6)
  square = whole["w"][:4] @ whole["w"][:4].T  # a block of orthogonal rows
  assert np.abs(square - np.diag(np.diag(square))).max() < 1e-5
  assert weight_matrices.Free().info.marginals == "exact"
  assert weight_matrices.Free(scale=0.5).info.marginals == "approximate"
