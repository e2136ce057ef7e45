"""Helpers of the components' tests: maps, estimates, the dense formulas.

The dense-exponential formulas are written in float64 on full matrices, with
inverses and determinants, where the package's code has a diagonal form.
"""

import jax
import jax.numpy as jnp
import numpy as np

import spectraformer_jax as sf
from spectraformer_jax.components import ComponentState, build_component
from tests.helpers import PAIRS, standard_scores

HEAD_DIM = PAIRS.shape[-1]


def build(component, matrix="iid", num_features=1, **kwargs):
  """Builds a map by names."""
  return sf.feature_map(
    component, matrix, num_features=num_features, component_kwargs=kwargs
  )


def draw_estimates(fm, num_draws, stats=None, change=None, seed=1, pairs=PAIRS):
  """Draws estimates ``[num_draws, P]`` of the pairs' kernels.

  Args:
    fm: the map.
    num_draws: independent draws.
    stats: given to both sides.
    change: a function of the variables of each draw, or None.
    seed: of the draws.
    pairs: ``[P, 2, H]``, all at position 0.
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


def first_head_state(fm, stats=None, change=None):
  """Returns the component state of the first example's only head."""
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
  """Checks mean (4 standard errors) and mean square (5) against formulas."""
  samples = draw_estimates(fm, num_draws, stats, change)
  state = first_head_state(fm, stats, change)
  x, y = jnp.asarray(PAIRS[:, 0]), jnp.asarray(PAIRS[:, 1])
  kernel = np.asarray(fm.component.kernel_value(x, y, state))
  scores = zero_safe_scores(samples, kernel)
  assert np.all(np.abs(scores) < 4.0), scores
  if squares:
    moment = np.exp(fm.component.log_second_moment(x, y, state))
    scores = zero_safe_scores(samples**2, np.asarray(moment))
    assert np.all(np.abs(scores) < 5.0), scores


def zero_safe_scores(samples, expected):
  """Returns `standard_scores`, or 0 if estimates and expectation are 0."""
  zero = (np.abs(samples).max(axis=0) < 1e-6) & (np.abs(expected) < 1e-6)
  samples = np.where(zero[None, :], 0.0, samples)
  with np.errstate(invalid="ignore"):
    scores = standard_scores(samples, np.where(zero, 0.0, expected))
  return np.where(zero, 0.0, scores)


# Components with options, by the name that a failing test shows.
CASES = {
  "posrf": ("posrf", {}),
  "posrf_hyp": ("posrf_hyp", {}),
  "trigrf": ("trigrf", {}),
  "oprf": ("oprf", {}),
  "oprf_hyp": ("oprf_hyp", {}),
  "gerf_default": ("gerf", {}),
  "gerf_negative": ("gerf", {"a": -0.2}),
  "gerf_positive": ("gerf", {"a": 0.03}),
  "gerf_complex": ("gerf", {"a": -0.1 + 0.08j}),
  "gerf_minus": ("gerf", {"a": -0.05, "sign": -1}),
  "gerf_minus_complex": ("gerf", {"a": -0.05 - 0.06j, "sign": -1}),
  "gerf_learn_sigmoid": ("gerf", {"learn": "sigmoid"}),
  "gerf_learn_exp": ("gerf", {"a": 0.02, "learn": "exp"}),
  "gerf_learn_minus": ("gerf", {"a": -0.05, "sign": -1, "learn": "exp"}),
  "saderf": ("saderf", {}),
  "perdim": ("saderf", {"per_dimension": True}),
  "sderf": ("sderf", {}),
  "aderf": ("aderf", {}),
  "asderf": ("asderf", {}),
  "c_posrf": ("posrf", {"centred": True}),
  "c_trigrf": ("trigrf", {"centred": True}),
  "c_oprf_hyp": ("oprf_hyp", {"centred": True}),
  "c_gerf_complex": ("gerf", {"a": -0.1 + 0.08j, "centred": True}),
  "c_asderf": ("asderf", {"centred": True}),
}


def build_case(case, num_features=16, matrix="iid", **kwargs):
  """Builds the feature map of a case, with further options."""
  name, options = CASES[case]
  return sf.feature_map(
    name,
    matrix,
    num_features=num_features,
    component_kwargs={**options, **kwargs},
  )


def draw_data(num_queries=60, num_keys=40, head_dim=4, seed=0):
  """Draws scaled queries and keys ``[T, H]`` of unlike moments."""
  rng = np.random.default_rng(seed)
  mix_q, mix_k = 0.3 * rng.normal(size=(2, head_dim, head_dim))
  query = rng.normal(size=(num_queries, head_dim)) @ mix_q + 0.2
  key = 0.7 * rng.normal(size=(num_keys, head_dim)) @ mix_k
  key += 0.1 * rng.normal(size=head_dim)
  return query.astype(np.float32), key.astype(np.float32)


def calibrate(fm, query=None, key=None):
  """Returns stats ``[1, 1, ...]`` of query and key ``[T, H]``, or None."""
  if query is None:
    query, key = draw_data()
  variables = fm.init(jax.random.key(0), head_dim=query.shape[-1])
  lift = lambda x: jnp.asarray(x)[None, :, None, :]
  return fm.calibrate(variables, lift(query), lift(key)) or None


def calibrated_state(component, query=None, key=None):
  """Returns the component state of one head after calibration."""
  if query is None:
    query, key = draw_data()
  params = component.init(jax.random.key(0), query.shape[-1], num_features=4)
  stats = ()
  if component.needs_stats:
    stats = component.solve(
      component.moments(jnp.asarray(query), jnp.asarray(key), None, None)
    )
  return ComponentState(params, {}, stats)


def case_component(case, **kwargs):
  """Builds the component of a case."""
  name, options = CASES[case]
  return build_component(name, {**options, **kwargs})


def dense_form(a, query_map, rotation):
  """Returns A, B1, B2, C1, C2 in float64 for diagonal `a` and a rotation."""
  eye = np.eye(len(a))
  dense = rotation @ np.diag(a) @ rotation.T
  root = rotation @ np.diag(np.sqrt(1.0 - 4.0 * a)) @ rotation.T
  b1 = root @ rotation @ query_map
  b2 = root @ rotation @ np.linalg.inv(query_map).T
  inner = np.linalg.inv(eye - 4.0 * dense)
  np.testing.assert_allclose(b1.T @ inner @ b2, eye, atol=1e-5)
  return dense, b1, b2, -0.5 * b1.T @ inner @ b1, -0.5 * b2.T @ inner @ b2


def dense_log_features(w, x, a, b, c):
  """Computes log-features ``[T, M]`` of rows ``[M, H]`` as in the paper."""
  quadratic = lambda m, v: np.einsum("ph,hk,pk->p", v, m, v)
  return (
    0.25 * np.linalg.slogdet(np.eye(len(a)) - 4.0 * a)[1]
    + quadratic(a, w)[None, :]
    + x @ b.T @ w.T
    + quadratic(c, x)[:, None]
  )


def dense_log_second_moment(x, y, a, b1, b2, c1, c2):
  """Computes log E Z^2 of pairs, ``[P]``, as in the paper."""
  eye = np.eye(len(a))
  quadratic = lambda m, v: np.einsum("ph,hk,pk->p", v, m, v)
  return (
    np.linalg.slogdet(eye - 4.0 * a)[1]
    - 0.5 * np.linalg.slogdet(eye - 8.0 * a)[1]
    + 2.0 * quadratic(np.linalg.inv(eye - 8.0 * a), x @ b1.T + y @ b2.T)
    + 2.0 * quadratic(c1, x)
    + 2.0 * quadratic(c2, y)
  )


def random_rotation(head_dim=4, seed=3):
  """Returns a random rotation in float64."""
  gaussian = np.random.default_rng(seed).normal(size=(head_dim, head_dim))
  return np.linalg.qr(gaussian)[0]


def as_matrix(linear):
  """Converts a map of stats, ``[H]`` or ``[H, H]``, to a float64 matrix."""
  linear = np.asarray(linear, np.float64)
  return linear if linear.ndim == 2 else np.diag(linear)
