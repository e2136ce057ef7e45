"""The learners, and many draws of one."""

import functools

import jax
import numpy as np

from spectraformer_jax.weight_matrices import WEIGHT_MATRICES, get_row_law

LEARNERS = (
  "bbq",
  "cov",
  "fastfood_learnable",
  "flow",
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


def fresh(matrix, rng, num_rows, head_dim):
  """Fresh params and projection of one head."""
  params_rng, projection_rng = jax.random.split(rng)
  return (
    matrix.init(params_rng, num_rows, head_dim),
    matrix.draw(projection_rng, num_rows, head_dim, gaussian_law()),
  )


def make(matrix, num_rows, head_dim, seed=0):
  """`fresh`, compiled."""
  return _jitted_make(matrix, jax.random.key(seed), num_rows, head_dim)


_jitted_make = quick_jit(fresh, static_argnums=(0, 2, 3))


def rows_of(matrix, params, projection, context=()):
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


@functools.cache
def initial_draws(matrix, num_rows, head_dim, num_draws):
  """Independent inits and draws: rows ``[R, M, H]``, weights ``[R, M]``."""

  @quick_jit
  @jax.vmap
  def draw(rng):
    return matrix.rows(*fresh(matrix, rng, num_rows, head_dim))

  sample = draw(jax.random.split(jax.random.key(0), num_draws))
  w = np.asarray(sample.w, np.float64)
  weights = np.full(w.shape[:2], 1.0 / num_rows)
  if sample.log_weight is not None:
    weights *= np.exp(np.asarray(sample.log_weight, np.float64))
  assert sample.sign is None
  return w, weights


def draws_of(matrix, params, num_rows, head_dim, num_draws, context=()):
  """Draws with the same params: rows ``[R, M, H]``, weights ``[R, M]``."""

  @quick_jit
  @jax.vmap
  def draw(rng):
    noise = matrix.draw(rng, num_rows, head_dim, gaussian_law())
    return matrix.rows(params, noise, context)

  sample = draw(jax.random.split(jax.random.key(3), num_draws))
  w = np.asarray(sample.w, np.float64)
  weights = np.full(w.shape[:2], 1.0 / num_rows)
  if sample.log_weight is not None:
    weights *= np.exp(np.asarray(sample.log_weight, np.float64))
  return w, weights
