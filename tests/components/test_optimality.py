"""Closed-form parameters against perturbations, and how components compare."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax.components import COMPONENTS, ComponentState
from tests.components.helpers import (
  as_matrix,
  build_case,
  calibrate,
  calibrated_state,
  case_component,
  draw_data,
  random_rotation,
)


def objective(query_map, key_map, a, query, key):
  """Returns the mean of log E Z^2 over all pairs, float64; `a` is ``[H]``."""
  x, y = query @ query_map.T, key @ key_map.T
  pair_square = np.mean((x[:, None] + y[None, :]) ** 2, axis=(0, 1))
  return np.sum(
    np.log(1.0 - 4.0 * a)
    - 0.5 * np.log(1.0 - 8.0 * a)
    + 2.0 * (1.0 - 4.0 * a) / (1.0 - 8.0 * a) * pair_square
    - np.mean(x**2, axis=0)
    - np.mean(y**2, axis=0)
  )


def closed_form(case, query, key):
  """Returns the component's G and a ``[H]``, in float64."""
  parameters = calibrated_state(case_component(case), query, key).stats
  rho = np.asarray(parameters["rho"], np.float64)
  head_dim = query.shape[-1]
  query_map = as_matrix(parameters.get("query_map", np.ones(head_dim)))
  return query_map, np.broadcast_to((1.0 - 1.0 / rho) / 8.0, (head_dim,))


def perturbed_map(case, query_map, rng, size):
  """Perturbs G within the family of the case."""
  noise = size * rng.normal(size=query_map.shape)
  if case == "oprf":
    return query_map
  if case in ("saderf", "perdim"):
    return np.diag(np.exp(np.diag(noise))) @ query_map
  if case == "aderf":
    return query_map + noise @ query_map
  # Rotations of the basis: (I - S)^-1 (I + S) for skew S.
  skew, eye = 0.5 * (noise - noise.T), np.eye(len(noise))
  return np.linalg.solve(eye - skew, eye + skew) @ query_map


@pytest.mark.parametrize("head_dim", [4, 8])
@pytest.mark.parametrize(
  "case", ["oprf", "saderf", "perdim", "sderf", "aderf", "asderf"]
)
def test_closed_form_beats_100_perturbations(case, head_dim):
  query, key = (
    x.astype(np.float64) for x in draw_data(head_dim=head_dim, seed=head_dim)
  )
  query_map, a = closed_form(case, query, key)
  key_map = np.linalg.inv(query_map).T
  optimum = objective(query_map, key_map, a, query, key)
  rng = np.random.default_rng(0)
  scalar = case in ("oprf", "saderf", "aderf")
  for size in np.geomspace(0.02, 0.5, 100):
    noise = size * rng.normal(size=() if scalar else head_dim)
    near_a = a * np.exp(noise)
    near_map = perturbed_map(case, query_map, rng, size)
    for a_, map_ in ((near_a, query_map), (a, near_map), (near_a, near_map)):
      if map_ is query_map and a_ is a:
        continue
      other = objective(map_, np.linalg.inv(map_).T, a_, query, key)
      assert optimum <= other + 1e-9, (size, other - optimum)
  # The perturbations move the objective at all.
  assert objective(query_map, key_map, 0.5 * a, query, key) > optimum + 1e-3


def structured(kind, head_dim=8):
  """Draws queries and keys that favour some components over others."""
  rng = np.random.default_rng(1)
  x, y = 0.5 * rng.normal(size=(2, 128, head_dim))
  scales = np.diag(np.geomspace(1.5, 0.1, head_dim))
  low, other_low = (scales @ random_rotation(head_dim, seed) for seed in (3, 5))
  x, y = {
    "isotropic": lambda: (x, y),
    "axis scales": lambda: (x, y * np.exp(0.7 * rng.normal(size=head_dim))),
    "unlike sizes": lambda: (2.0 * x, 0.5 * y),
    "shared covariance": lambda: (x @ low, y @ low),
    "unlike covariances": lambda: (x @ low, y @ other_low),
    "mean": lambda: (x + 0.5, y + 0.5),
  }[kind]()
  return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize(
  "kind",
  [
    "isotropic",
    "axis scales",
    "unlike sizes",
    "shared covariance",
    "unlike covariances",
    "mean",
  ],
)
@pytest.mark.quick_every(4)
def test_order_of_mean_log_second_moments(kind):
  query, key = structured(kind)

  def mean_moment(case):
    component = case_component(case)
    return float(
      jnp.mean(
        component.log_second_moment(
          jnp.asarray(query)[:, None, :],
          jnp.asarray(key)[None, :, :],
          calibrated_state(component, query, key),
        )
      )
    )

  moment = {
    case: mean_moment(case)
    for case in (
      "posrf",
      "oprf",
      "saderf",
      "perdim",
      "sderf",
      "aderf",
      "asderf",
      "posrf_hyp",
      "oprf_hyp",
      "c_posrf",
    )
  }
  orders = [
    ("posrf", "oprf", "saderf", "aderf", "asderf"),
    ("oprf", "sderf", "asderf"),
    ("saderf", "perdim"),
    ("posrf", "posrf_hyp"),
    ("oprf", "oprf_hyp"),
    ("posrf", "c_posrf"),
  ]
  for order in orders:
    for worse, better in zip(order, order[1:], strict=False):
      # The ridge on second moments may cost aderf about its square, 1e-6.
      assert moment[better] <= moment[worse] + 1e-5, (worse, better, moment)
  # What each is for shows.
  gains = {
    "axis scales": ("saderf", "perdim"),
    "unlike sizes": ("oprf", "saderf"),
    "shared covariance": ("oprf", "sderf"),
    "unlike covariances": ("saderf", "aderf"),
    "mean": ("posrf", "c_posrf"),
  }
  worse, better = gains.get(kind, ("posrf", "oprf"))
  assert moment[better] < moment[worse] - 0.1, moment


def test_opposite_scales_are_balanced_and_bounded():
  # psi is clipped, and zero queries or keys leave finite maps.
  query, key = draw_data()
  for scale_q, scale_k in ((1e-9, 1e9), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
    for case in ("saderf", "aderf", "asderf", "sderf"):
      stats = calibrated_state(
        case_component(case), query * scale_q, key * scale_k
      ).stats
      for name, leaf in stats.items():
        assert np.all(np.isfinite(leaf)), (case, name)
      query_map, key_map = (
        as_matrix(stats[f"{side}_map"]) for side in ("query", "key")
      )
      np.testing.assert_allclose(query_map.T @ key_map, np.eye(4), atol=1e-5)
      assert np.all(stats["rho"] > 0.0) and np.all(stats["rho"] <= 1.0)


@pytest.mark.parametrize("case", ["sderf", "aderf", "asderf"])
def test_fewer_tokens_than_dimensions_keep_maps_inverse(case):
  # Singular second moments: G may be poor, but G^-T must be its inverse.
  query, key = draw_data(num_queries=5, num_keys=4, head_dim=64)
  stats = calibrated_state(case_component(case), query, key).stats
  query_map, key_map = (
    as_matrix(stats[f"{side}_map"]) for side in ("query", "key")
  )
  # float32 rounding of G^-T; seven times that without the Newton step.
  error = np.abs(query_map.T @ key_map - np.eye(64)).max()
  assert error < 1e-6, error
  dots = (query @ query_map.T) @ (key @ key_map.T).T
  np.testing.assert_allclose(dots, query @ key.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [5, 40])
@pytest.mark.parametrize("case", ["sderf", "aderf", "asderf"])
@pytest.mark.quick_every(6)
def test_rounding_does_not_choose_the_features(case, num_tokens):
  # Signs of eigenvectors, and their choice where eigenvalues are equal (zero,
  # for fewer tokens than dimensions), are those of rounding.
  fm = build_case(case, num_features=8)
  query, key = draw_data(num_tokens, num_tokens - 1, head_dim=16)
  variables = fm.init(jax.random.key(0), head_dim=16)
  features = [
    fm.apply(
      variables,
      jnp.asarray(query)[None, :, None, :],
      side="query",
      stats=calibrate(fm, query[::step] * size, key[::step]),
    )
    for step, size in ((1, 1.0), (-1, 1.0), (1, np.float32(1.0 + 1e-6)))
  ]
  for other in features[1:]:
    np.testing.assert_allclose(other, features[0], rtol=2e-3)


def relative_variance(name, scale):
  """Returns the median relative variance of one feature at a scale."""
  x, y = np.random.default_rng(0).normal(size=(2, 60, 32)) * scale
  x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
  component = COMPONENTS.build(name)
  stats = ()
  if component.needs_stats:
    stats = component.solve(component.moments(x, y, None, None))
  state = ComponentState({}, {}, stats)
  moment = component.log_second_moment(x[:, None], y[None, :], state)
  log_kernel = jnp.einsum("th,sh->ts", x, y)
  per_row = float(np.exp(np.mean(np.asarray(moment - 2.0 * log_kernel)))) - 1.0
  return per_row * component.feature_dim(64, 32) / 64


def test_tables_name_the_component_of_least_variance():
  unequal = 0.3 * np.exp(0.8 * np.random.default_rng(1).normal(size=32))
  typical = {
    label: {
      name: relative_variance(name, scale)
      for name in ("posrf", "oprf", "oprf_hyp", "asderf", "geomrf")
    }
    for label, scale in (("small", 0.1), ("unit", 32**-0.25), ("axes", unequal))
  }
  assert min(typical["small"], key=typical["small"].get) == "oprf_hyp"
  assert min(typical["axes"], key=typical["axes"].get) == "asderf"
  assert typical["unit"]["geomrf"] < 0.7 * typical["unit"]["posrf"]
  # At small norms it gains nothing.
  ratio = typical["small"]["geomrf"] / typical["small"]["posrf"]
  assert 0.95 < ratio < 1.1
