"""The exponential components, data to calibrate them, and the dense formulas.

The dense-exponential formulas are written in float64 on full matrices, with
inverses and determinants, where the package's code has a diagonal form.
"""

import jax
import jax.numpy as jnp
import numpy as np

import spectraformer_jax as sf
from spectraformer_jax.components import ComponentState, build_component

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


def build(case, num_features=16, matrix="iid", **kwargs):
  """The feature map of a case, with further options."""
  name, options = CASES[case]
  return sf.feature_map(
    name,
    matrix,
    num_features=num_features,
    component_kwargs={**options, **kwargs},
  )


def data(num_queries=60, num_keys=40, head_dim=4, seed=0):
  """Queries and keys of unlike covariances and means, ``[T, H]``, scaled."""
  rng = np.random.default_rng(seed)
  mix_q, mix_k = 0.3 * rng.normal(size=(2, head_dim, head_dim))
  query = rng.normal(size=(num_queries, head_dim)) @ mix_q + 0.2
  key = 0.7 * rng.normal(size=(num_keys, head_dim)) @ mix_k
  key += 0.1 * rng.normal(size=head_dim)
  return query.astype(np.float32), key.astype(np.float32)


def calibrated(fm, query=None, key=None):
  """Stats of one example and one head; None where there are none."""
  if query is None:
    query, key = data()
  variables = fm.init(jax.random.key(0), head_dim=query.shape[-1])
  lift = lambda x: jnp.asarray(x)[None, :, None, :]
  return fm.calibrate(variables, lift(query), lift(key)) or None


def state_of(component, query=None, key=None):
  """What a component knows of one head after calibration."""
  if query is None:
    query, key = data()
  params = component.init(jax.random.key(0), query.shape[-1])
  stats = ()
  if component.needs_stats:
    stats = component.solve(
      component.moments(jnp.asarray(query), jnp.asarray(key), None, None)
    )
  return ComponentState(params, {}, stats)


def component_of(case, **kwargs):
  """The component of a case."""
  name, options = CASES[case]
  return build_component(name, {**options, **kwargs})


def dense_form(a, query_map, rotation):
  """A, B1, B2, C1, C2 in float64 for diagonal `a`, turned by a rotation."""
  eye = np.eye(len(a))
  dense = rotation @ np.diag(a) @ rotation.T
  root = rotation @ np.diag(np.sqrt(1.0 - 4.0 * a)) @ rotation.T
  b1 = root @ rotation @ query_map
  b2 = root @ rotation @ np.linalg.inv(query_map).T
  inner = np.linalg.inv(eye - 4.0 * dense)
  np.testing.assert_allclose(b1.T @ inner @ b2, eye, atol=1e-5)
  return dense, b1, b2, -0.5 * b1.T @ inner @ b1, -0.5 * b2.T @ inner @ b2


def dense_log_features(w, x, a, b, c):
  """Log-features ``[T, M]`` of rows ``[M, H]`` by the textbook formula."""
  quadratic = lambda m, v: np.einsum("ph,hk,pk->p", v, m, v)
  return (
    0.25 * np.linalg.slogdet(np.eye(len(a)) - 4.0 * a)[1]
    + quadratic(a, w)[None, :]
    + x @ b.T @ w.T
    + quadratic(c, x)[:, None]
  )


def dense_log_second_moment(x, y, a, b1, b2, c1, c2):
  """Log E Z^2 of pairs ``[P]`` by the textbook formula."""
  eye = np.eye(len(a))
  quadratic = lambda m, v: np.einsum("ph,hk,pk->p", v, m, v)
  return (
    np.linalg.slogdet(eye - 4.0 * a)[1]
    - 0.5 * np.linalg.slogdet(eye - 8.0 * a)[1]
    + 2.0 * quadratic(np.linalg.inv(eye - 8.0 * a), x @ b1.T + y @ b2.T)
    + 2.0 * quadratic(c1, x)
    + 2.0 * quadratic(c2, y)
  )


def rotation(head_dim=4, seed=3):
  """A random rotation in float64."""
  gaussian = np.random.default_rng(seed).normal(size=(head_dim, head_dim))
  return np.linalg.qr(gaussian)[0]


def matrix_of(linear):
  """A map of stats, ``[H]`` or ``[H, H]``, as a float64 matrix."""
  linear = np.asarray(linear, np.float64)
  return linear if linear.ndim == 2 else np.diag(linear)
