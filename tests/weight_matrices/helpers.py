"""Samples of weight matrices, and checks of their laws, for several tests."""

import functools

import jax
import numpy as np
from scipy import stats

from spectraformer_jax.weight_matrices import WEIGHT_MATRICES, get_row_law

LEARNERS = (
  "bbq",
  "cov",
  "fastfood_learnable",
  "flow",
  "free",
  "generator",
  "gmm",
  "learned_orf",
  "learned_radial",
  "variational",
)
REDRAWABLE = tuple(
  name for name in LEARNERS if WEIGHT_MATRICES.build(name).info.redrawable
)

# These programs run for milliseconds and compile for seconds: optimise less.
quick_jit = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


def gaussian_law():
  return get_row_law("gaussian")


def init_and_draw(matrix, rng, num_rows, head_dim):
  """Fresh params and projection of one head."""
  params_rng, projection_rng = jax.random.split(rng)
  return (
    matrix.init(params_rng, num_rows, head_dim),
    matrix.draw(projection_rng, num_rows, head_dim, gaussian_law()),
  )


def compiled_init_and_draw(matrix, num_rows, head_dim, seed=0):
  """`init_and_draw`, compiled."""
  return _jitted_init_and_draw(matrix, jax.random.key(seed), num_rows, head_dim)


_jitted_init_and_draw = quick_jit(init_and_draw, static_argnums=(0, 2, 3))


def compiled_rows(matrix, params, projection, context=()):
  """`matrix.rows`, compiled."""
  return _jitted_rows(matrix, params, projection, context)


_jitted_rows = quick_jit(
  lambda matrix, *args: matrix.rows(*args), static_argnums=0
)


def randomise(params, seed=0, scale=0.5):
  """The same tree, its leaves moved by Gaussian noise."""
  noise = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: leaf + np.float32(scale * noise.normal(size=leaf.shape)),
    params,
  )


def rows_and_weights(sample):
  """Returns rows ``[R, M, H]`` and weights ``[R, M]`` of draws, float64.

  Weights are 1 / M each unless the matrix weighs its rows.
  """
  w = np.asarray(sample.w, np.float64)
  weights = np.full(w.shape[:2], 1.0 / w.shape[1])
  if sample.log_weight is not None:
    weights *= np.exp(np.asarray(sample.log_weight, np.float64))
  if sample.sign is not None:
    assert set(np.unique(sample.sign)) <= {-1.0, 1.0}
    weights *= np.asarray(sample.sign, np.float64)
  return w, weights


@functools.cache
def draw_initial_rows(matrix, num_rows, head_dim, num_draws):
  """Independent inits and draws: rows ``[R, M, H]``, weights ``[R, M]``."""

  @quick_jit
  @jax.vmap
  def draw(rng):
    return matrix.rows(*init_and_draw(matrix, rng, num_rows, head_dim))

  return rows_and_weights(draw(jax.random.split(jax.random.key(0), num_draws)))


def draw_learner_rows(
  matrix, params, num_rows, head_dim, num_draws, context=()
):
  """Draws with the same params: rows ``[R, M, H]``, weights ``[R, M]``."""

  @quick_jit
  @jax.vmap
  def draw(rng):
    noise = matrix.draw(rng, num_rows, head_dim, gaussian_law())
    return matrix.rows(params, noise, context)

  return rows_and_weights(draw(jax.random.split(jax.random.key(3), num_draws)))


def draw_once(matrix, rng, num_rows, head_dim):
  """Draws the rows of a matrix, or of a registered name, once: float64."""
  if isinstance(matrix, str):
    matrix = WEIGHT_MATRICES.build(matrix)
  draw = lambda rng: matrix.draw(rng, num_rows, head_dim, gaussian_law())["w"]
  return np.asarray(jax.jit(draw)(rng), np.float64)


@functools.cache
def draw_rows(matrix, num_rows, head_dim, num_draws, law="gaussian", seed=0):
  """Independent draws: rows ``[R, M, H]``, weights ``[R, M]``."""
  matrix.check(num_rows, head_dim)

  @jax.jit
  @jax.vmap
  def draw(rng):
    projection = matrix.draw(rng, num_rows, head_dim, get_row_law(law))
    return matrix.rows({}, projection)

  rngs = jax.random.split(jax.random.key(seed), num_draws)
  return rows_and_weights(draw(rngs))


def directions(head_dim):
  """Unit vectors on which bad designs show: generic, axis, flat, diagonal."""
  generic = np.random.default_rng(0).normal(size=head_dim)
  axis, diagonal = np.zeros(head_dim), np.zeros(head_dim)
  axis[0] = 1.0
  diagonal[:2] = 1.0
  vectors = np.stack([generic, axis, np.ones(head_dim), diagonal])
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def row_estimates(rows, weights, z, kind):
  """Weighted means over rows of cos(w.z) ("trig") or exp(w.z) ("pos").

  Args:
    rows: ``[R, M, H]``.
    weights: ``[R, M]``.
    z: ``[P, H]``.
    kind: "trig" or "pos".

  Returns:
    ``[R, P]``.
  """
  function = {"trig": np.cos, "pos": np.exp}[kind]
  return np.einsum("rm,rmp->rp", weights, function(rows @ z.T))


def gaussian_means(z, kind):
  """The means of `row_estimates` for rows of N(0, I): ``[P]``."""
  half_square = 0.5 * np.sum(np.square(z), axis=-1)
  return np.exp(-half_square if kind == "trig" else half_square)


def assert_rows_are_gaussian(rows):
  """Norms and adversarial projections of single rows, by KS; all finite."""
  assert np.isfinite(rows).all()
  # A row of each draw, another one each time: rows of one draw are coupled.
  which = np.arange(len(rows)) % rows.shape[1]
  single = rows[np.arange(len(rows)), which]
  head_dim = rows.shape[2]
  squares = np.sum(single**2, axis=1)
  p_values = [stats.kstest(squares, stats.chi2(head_dim).cdf).pvalue]
  for direction in directions(head_dim):
    p_values.append(stats.kstest(single @ direction, "norm").pvalue)
  assert min(p_values) > 1e-4, p_values


def assert_first_moments(rows, weights):
  """Weighted mean 0, covariance I and total weight 1, within 4.5 errors."""
  head_dim = rows.shape[2]
  covariance = np.einsum("rm,rmi,rmj->rij", weights, rows, rows)
  samples = np.concatenate(
    [
      np.einsum("rm,rmi->ri", weights, rows),
      covariance.reshape(len(rows), -1),
      weights.sum(axis=1, keepdims=True),
    ],
    axis=1,
  )
  expected = np.concatenate(
    [np.zeros(head_dim), np.eye(head_dim).ravel(), np.ones(1)]
  )
  error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
  # 1e-5: designs that match a moment exactly leave float32 rounding.
  scores = (samples.mean(axis=0) - expected) / np.hypot(error, 1e-5)
  # 4.5, not 4: some eighty numbers are looked at.
  assert np.abs(scores).max() < 4.5, scores
