"""Monte Carlo estimates of kernels, for tests of unbiasedness."""

import jax
import jax.numpy as jnp
import numpy as np

# Three pairs at H = 4: generic, opposite, and with signed coordinates.
PAIRS = np.array(
  [
    [[0.3, -0.2, 0.5, 0.1], [0.4, 0.1, 0.3, -0.2]],
    [[0.4, 0.3, -0.2, 0.1], [-0.4, -0.3, 0.2, -0.1]],
    [[-0.6, 0.5, 0.2, -0.3], [0.5, 0.4, -0.4, 0.2]],
  ],
  np.float32,
)


def estimates(feature_map, rng, pairs, num_draws, stats=None, variables=None):
  """Kernel estimates of many independent draws.

  Args:
    feature_map: the map.
    rng: PRNG key.
    pairs: ``[P, 2, H]``, scaled.
    num_draws: R.
    stats: given to both sides.
    variables: whose params to keep; fresh ones for each draw if None.

  Returns:
    ``[R, P]`` float32.
  """
  x, y = jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1])
  head_dim = x.shape[-1]

  @jax.jit
  def one_draw(rng):
    drawn = feature_map.init(rng, head_dim=head_dim)
    if variables is not None:
      drawn = drawn._replace(params=variables.params)
    apply = lambda points, side: feature_map.apply(
      drawn, points[None, :, None, :], side=side, stats=stats
    )[0, :, 0]
    return jnp.sum(apply(x, "query") * apply(y, "key"), axis=-1)

  return np.asarray(jax.lax.map(one_draw, jax.random.split(rng, num_draws)))


def standard_scores(samples, expected):
  """(mean - expected) in standard errors of the mean, per column."""
  samples = samples.astype(np.float64)
  error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
  # Where an estimate is exact, float32 rounding of one value is what is left.
  rounding = 1e-6 * np.abs(expected)
  return (samples.mean(axis=0) - expected) / np.maximum(error, rounding)
