"""Independent draws of one-row estimates: their mean and their square."""

import jax
import jax.numpy as jnp
import numpy as np

import spectraformer_jax as sf
from spectraformer_jax.components import ComponentState
from tests.statistics import PAIRS, standard_scores

HEAD_DIM = PAIRS.shape[-1]


def build(component, matrix="iid", num_features=1, **kwargs):
  """A map by names."""
  return sf.feature_map(
    component, matrix, num_features=num_features, component_kwargs=kwargs
  )


def sample(fm, num_draws, stats=None, change=None, seed=1, pairs=PAIRS):
  """Estimates ``[num_draws, P]`` at the pairs.

  Args:
    fm: the map.
    num_draws: independent draws.
    stats: given to both sides.
    change: what is done to the variables of each draw, if not None.
    seed: of the draws.
    pairs: ``[P, 2, H]``; all stand at position 0.
  """

  @jax.jit
  def one_draw(rng):
    variables = fm.init(rng, head_dim=pairs.shape[-1])
    if change is not None:
      variables = change(variables)
    phi, psi = (
      fm.apply(
        variables,
        jnp.asarray(pairs)[:, side, None, None, :],
        side=name,
        stats=stats,
      )
      for side, name in enumerate(("query", "key"))
    )
    return jnp.sum(phi * psi, axis=-1)[:, 0, 0]

  rngs = jax.random.split(jax.random.key(seed), num_draws)
  draws = jax.jit(lambda rngs: jax.lax.map(one_draw, rngs, batch_size=500))
  return np.asarray(draws(rngs), np.float64)


def one_head(fm, stats=None, change=None):
  """What the component knows of the only head of the first example."""
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  if change is not None:
    variables = change(variables)
  params, random = (
    jax.tree.map(lambda leaf: leaf[0], tree.get("component", {}))
    for tree in variables
  )
  own = (stats or {}).get("component", ())
  return ComponentState(
    params, random, jax.tree.map(lambda leaf: leaf[0, 0], own)
  )


def check_mean_and_square(fm, num_draws, stats=None, change=None, squares=True):
  """Mean within 4, mean square within 5 standard errors of the formulas."""
  samples = sample(fm, num_draws, stats, change)
  state = one_head(fm, stats, change)
  x, y = jnp.asarray(PAIRS[:, 0]), jnp.asarray(PAIRS[:, 1])
  kernel = np.asarray(fm.component.kernel_value(x, y, state))
  scores = scores_of(samples, kernel)
  assert np.all(np.abs(scores) < 4.0), scores
  if squares:
    moment = np.exp(fm.component.log_second_moment(x, y, state))
    scores = scores_of(samples**2, np.asarray(moment))
    assert np.all(np.abs(scores) < 5.0), scores


def scores_of(samples, expected):
  """`standard_scores`; 0 where the estimate is 0 and should be."""
  zero = (np.abs(samples).max(axis=0) < 1e-6) & (np.abs(expected) < 1e-6)
  samples = np.where(zero[None, :], 0.0, samples)
  with np.errstate(invalid="ignore"):
    scores = standard_scores(samples, np.where(zero, 0.0, expected))
  return np.where(zero, 0.0, scores)


def shared_stats(fm, query, key):
  """Stats ``[1, 1, ...]`` of query ``[T, H]`` and key ``[S, H]``."""
  variables = fm.init(jax.random.key(0), head_dim=query.shape[-1])
  lift = lambda x: jnp.asarray(x)[None, :, None, :]
  return fm.calibrate(variables, lift(query), lift(key))
