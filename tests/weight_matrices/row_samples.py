"""Many draws of one weight matrix, and what tests ask of them."""

import functools

import jax
import numpy as np
from scipy import stats

from spectraformer_jax.weight_matrices import get_row_law


@functools.cache
def draws(matrix, num_rows, head_dim, num_draws, law="gaussian", seed=0):
  """Independent draws.

  Returns:
    Rows ``[R, M, H]`` and their weights ``[R, M]`` (1 / M each unless the
    matrix weighs them), both float64.
  """
  matrix.check(num_rows, head_dim)

  @jax.jit
  @jax.vmap
  def draw(rng):
    projection = matrix.draw(rng, num_rows, head_dim, get_row_law(law))
    return matrix.rows({}, projection)

  sample = draw(jax.random.split(jax.random.key(seed), num_draws))
  w = np.asarray(sample.w, np.float64)
  weights = np.full(w.shape[:2], 1.0 / num_rows)
  if sample.log_weight is not None:
    weights *= np.exp(np.asarray(sample.log_weight, np.float64))
  if sample.sign is not None:
    assert set(np.unique(sample.sign)) <= {-1.0, 1.0}
    weights *= np.asarray(sample.sign, np.float64)
  return w, weights


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
