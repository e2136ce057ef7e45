"""What all learners share: the law at the start, gradients, options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax import weight_matrices
from spectraformer_jax.weight_matrices import WEIGHT_MATRICES
from spectraformer_jax.weight_matrices.learners import (
  inverse_softplus,
  soft_clip,
)
from tests.helpers import standard_scores
from tests.weight_matrices.helpers import (
  LEARNERS,
  REDRAWABLE,
  assert_first_moments,
  assert_rows_are_gaussian,
  compiled_init_and_draw,
  compiled_rows,
  directions,
  draw_initial_rows,
  gaussian_means,
  init_and_draw,
  quick_jit,
  randomise,
  row_estimates,
)

# M is no multiple of H, of its power of two, nor of the mixture's components.
NUM_ROWS, HEAD_DIM, NUM_DRAWS = 13, 6, 2500
AT_THE_START = [WEIGHT_MATRICES.build(name) for name in LEARNERS] + [
  weight_matrices.GMM(num_components=1),
  weight_matrices.Generator(base="iid"),
  weight_matrices.Variational(context="learned"),
]


def label(matrix):
  return repr(matrix).split(".")[-1]


@pytest.mark.parametrize("matrix", AT_THE_START, ids=label)
@pytest.mark.quick_every(8)
def test_rows_start_as_gaussian(matrix):
  assert matrix.info.marginals == "exact"
  rows, weights = draw_initial_rows(matrix, NUM_ROWS, HEAD_DIM, NUM_DRAWS)
  assert_rows_are_gaussian(rows)
  assert_first_moments(rows, weights)


@pytest.mark.parametrize("kind", ["trig", "pos"])
@pytest.mark.parametrize("matrix", AT_THE_START, ids=label)
def test_estimates_start_unbiased(matrix, kind):
  rows, weights = draw_initial_rows(matrix, NUM_ROWS, HEAD_DIM, NUM_DRAWS)
  z = np.sqrt(2.0) * directions(HEAD_DIM)
  samples = row_estimates(rows, weights, z, kind)
  scores = standard_scores(samples, gaussian_means(z, kind))
  assert np.abs(scores).max() < 4.0, scores


@pytest.mark.parametrize("size", [(32, 32), (16, 32), (50, 24), (7, 5)])
@pytest.mark.parametrize("name", LEARNERS)
def test_shapes_and_dtypes(name, size):
  num_rows, head_dim = size
  matrix = WEIGHT_MATRICES.build(name)
  matrix.check(num_rows, head_dim)
  params, projection = jax.eval_shape(
    lambda rng: init_and_draw(matrix, rng, num_rows, head_dim),
    jax.random.key(0),
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.float32.dtype}
  rows = jax.eval_shape(matrix.rows, params, projection)
  assert rows.w.shape == size and rows.w.dtype == jnp.float32
  half = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, jnp.bfloat16 if leaf.dtype == jnp.float32 else leaf.dtype
    ),
    projection,
  )
  assert jax.eval_shape(matrix.rows, params, half).w.dtype == jnp.float32


def init_variables(feature_map, num_heads=2):
  """Variables for head_dim 6."""
  init = lambda rng: feature_map.init(rng, head_dim=6, num_heads=num_heads)
  return quick_jit(init)(jax.random.key(0))


def loss_of(feature_map, variables, x, stats):
  """A loss of the kernel matrix that no symmetry makes stationary."""

  def loss(params):
    apply = lambda side: feature_map.apply(
      variables._replace(params=params), x, side=side, stats=stats
    )
    kernel = jnp.einsum("tnf,snf->nts", apply("query"), apply("key"))
    weights = jnp.cos(jnp.arange(kernel.size)).reshape(kernel.shape)
    return jnp.sum(weights * kernel)

  return loss


# Learners whose last layer starts at zero: layers before it have no gradient
# at the start.
NETWORKS = ("flow", "generator", "variational")
# Learners each entry of whose parameters counts, also where rows and columns
# are dropped and a block is incomplete, as here.
NO_IDLE_ENTRY = ("cov", "fastfood_learnable", "free", "gmm", "learned_orf")


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.quick_every(8)
def test_every_leaf_has_a_gradient(name):
  fm = sf.feature_map("posrf", name, num_features=13)
  variables = init_variables(fm)
  x = 0.7 * jax.random.normal(jax.random.key(1), (1, 5, 2, 6))
  stats = fm.calibrate(variables, x, x)
  gradient = quick_jit(jax.grad(loss_of(fm, variables, x[0], stats)))
  params = variables.params
  grads = gradient(params)
  if name in NETWORKS:
    stuck = [bool((leaf == 0.0).all()) for leaf in jax.tree.leaves(grads)]
    assert any(stuck) and not all(stuck)
    step = lambda p, g: p - 0.01 * jnp.sign(g)
    grads = gradient(jax.tree.map(step, params, grads))
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    path = jax.tree_util.keystr(path)
    assert jnp.isfinite(leaf).all(), path
    for head in range(2):
      assert jnp.abs(leaf[head]).max() > 1e-6, path
    if name in NO_IDLE_ENTRY:
      assert (jnp.abs(leaf) > 1e-9).all(), path


@pytest.mark.parametrize("name", REDRAWABLE)
def test_couplings_of_the_noise_carry_over(name):
  # Any base serves; its rows are the noise, and what W starts as.
  matrix = dataclasses.replace(WEIGHT_MATRICES.build(name), base="mm")
  if name == "gmm":
    matrix = dataclasses.replace(matrix, num_components=1)
  assert matrix.info.marginals == "approximate"
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  w = np.asarray(compiled_rows(matrix, params, projection).w)
  # float32 sums of the splines' ramps.
  np.testing.assert_allclose(w, projection["w"], atol=2e-5)
  np.testing.assert_allclose(w.T @ w / 13, np.eye(6), atol=1e-4)
  with pytest.raises(ValueError, match="'mm' needs num_features > head_dim"):
    matrix.check(6, 6)


@pytest.mark.parametrize("name", LEARNERS)
def test_rows_are_finite_far_from_the_start(name):
  matrix = WEIGHT_MATRICES.build(name)
  params, projection = compiled_init_and_draw(matrix, 13, 6)
  sample = compiled_rows(matrix, randomise(params, scale=10.0), projection)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(sample))


@pytest.mark.parametrize("name", REDRAWABLE)
def test_model_redraw_changes_the_noise_alone(name):
  fm = sf.feature_map("posrf", name, num_features=13)
  draw = quick_jit(lambda rng: fm.init_projection(rng, head_dim=6, num_heads=2))
  collection = {
    f"layer_{i}": {"projection": draw(jax.random.key(i))} for i in range(2)
  }
  redraw = quick_jit(sf.nn.redraw, static_argnums=0)
  drawn = redraw(fm, jax.random.key(5), collection)
  assert jax.tree.structure(drawn) == jax.tree.structure(collection)
  old, new = (
    np.stack([x[f"layer_{i}"]["projection"]["rows"]["w"] for i in range(2)])
    for x in (collection, drawn)
  )
  assert new.shape == old.shape == (2, 2, 13, 6)
  # Two layers of two heads, before and after: all different.
  drawings = np.concatenate([old, new]).reshape(8, -1)
  assert len(np.unique(drawings.round(4), axis=0)) == 8


@pytest.mark.parametrize("name", sorted(set(LEARNERS) - set(REDRAWABLE)))
def test_parameters_that_are_the_matrix_cannot_be_redrawn(name):
  fm = sf.feature_map("posrf", name, num_features=13)
  with pytest.raises(ValueError, match=f"'{name}' cannot be redrawn"):
    fm.redraw(jax.random.key(1), sf.FeatureVariables({}, {}))


class TwoDraws(sf.components.TrigRF):
  """A component that wants two independent matrices."""

  row_draws = 2


@pytest.mark.parametrize(
  "name", ["gmm", "fastfood_learnable", "learned_orf", "free"]
)
def test_two_draws_of_one_learner_have_parameters_each(name):
  matrix = WEIGHT_MATRICES.build(name)
  fm = sf.compose(TwoDraws(), matrix, num_features=10)
  one_head = jax.tree.map(lambda leaf: leaf[0], init_variables(fm, num_heads=1))
  rows = quick_jit(fm._rows)(*one_head)
  assert rows.w.shape == (10, 6)
  params = one_head.params["rows"]
  projection = jax.tree.map(
    lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]),
    one_head.projection.get("rows", {}),
  )
  for draw in range(2):
    expected = compiled_rows(
      matrix, *jax.tree.map(lambda leaf, i=draw: leaf[i], (params, projection))
    )
    own = slice(5 * draw, 5 * draw + 5)
    np.testing.assert_allclose(rows.w[own], expected.w, rtol=1e-5, atol=1e-6)
    if name in ("gmm", "free"):
      np.testing.assert_allclose(rows.log_weight[own], expected.log_weight)
  assert not np.allclose(rows.w[:5], rows.w[5:], atol=0.1)


@pytest.mark.parametrize(
  ("base", "reason"),
  [
    ("gmm", "is a learner itself"),
    ("none", "makes no Gaussian rows"),
    ("importance", "weighs its rows"),
    ("sgq", "weighs its rows"),
  ],
)
def test_bases_that_cannot_be_noise_are_refused(base, reason):
  with pytest.raises(ValueError, match=f"got '{base}', which {reason}"):
    weight_matrices.BBQ(base=base)


@pytest.mark.parametrize(
  ("name", "kwargs", "message"),
  [
    ("cov", {"base": "orff"}, "Unknown weight matrix 'orff'.*'orf'"),
    ("gmm", {"num_components": 0}, "num_components must be a positive"),
    ("gmm", {"min_log_sigma": 0.5}, "min_log_sigma and max_log_sigma"),
    ("generator", {"num_hidden": 0}, "num_hidden must be a positive"),
    ("generator", {"hidden_factor": 1.5}, "hidden_factor must be a positive"),
    ("bbq", {"num_pieces": 0}, "num_pieces must be a positive"),
    ("free", {"scale": 0.0}, "scale must be positive and finite, got 0.0"),
    ("flow", {"num_couplings": 0}, "num_couplings must be a positive"),
    ("flow", {"hidden_factor": 0}, "hidden_factor must be a positive"),
    (
      "learned_radial",
      {"num_pieces": 1},
      "num_pieces must be an integer >= 2",
    ),
    ("variational", {"context": "key"}, "context must be one of .* got 'key'"),
    ("variational", {"hidden_factor": 0}, "hidden_factor must be a positive"),
    ("variational", {"max_log_sigma": -1.0}, "min_log_sigma and max_log_sigma"),
  ],
)
def test_bad_options_are_refused(name, kwargs, message):
  with pytest.raises(ValueError, match=message) as error:
    sf.feature_map("posrf", name, num_features=8, weight_matrix_kwargs=kwargs)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "num_features", "head_dim", "message"),
  [
    ("gmm", 3, 6, "num_features=3 and num_components=4"),
    ("flow", 8, 1, "'flow' needs head_dim >= 2, got head_dim=1"),
    ("learned_orf", 8, 1, "'learned_orf' needs head_dim >= 2, got head_dim=1"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(
  name, num_features, head_dim, message
):
  fm = sf.feature_map("posrf", name, num_features=num_features)
  with pytest.raises(ValueError, match=message):
    fm.init(jax.random.key(0), head_dim=head_dim)


@pytest.mark.parametrize(
  "name", sorted(set(LEARNERS) - {"flow", "learned_orf"})
)
def test_a_single_coordinate_is_enough_for_the_others(name):
  matrix = WEIGHT_MATRICES.build(name)
  matrix.check(4, 1)
  rows = compiled_rows(matrix, *compiled_init_and_draw(matrix, 4, 1))
  assert rows.w.shape == (4, 1) and jnp.isfinite(rows.w).all()


def test_soft_clip_is_a_clip_without_dead_gradients():
  x = jnp.linspace(-12.0, 12.0, 97)
  clip = jax.value_and_grad(lambda x: soft_clip(x, -3.0, 1.0))
  y, slope = quick_jit(jax.vmap(clip))(x)
  assert (y >= -3.0).all() and (y <= 1.0).all()
  assert (slope[x < 8.0] > 0.0).all() and (slope <= 1.0).all()
  assert slope[48] == 1.0 and y[48] == 0.0
  small = jnp.float32(1e-2)
  # tanh x = x - x^3 / 3: 3.3e-7.
  np.testing.assert_allclose(soft_clip(small, -3.0, 1.0), small, atol=1e-6)


def test_inverse_softplus_inverts():
  x = jnp.array([1e-6, 1e-3, 1.0, 8.0, 50.0])
  y = jax.nn.softplus(inverse_softplus(x))
  np.testing.assert_allclose(y, x, rtol=1e-5)
