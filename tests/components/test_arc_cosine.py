"""Powers of the positive part: arc-cosine kernels, and ReLU without W."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import spectraformer_jax as sf
from spectraformer_jax.components.arc_cosine import log_arc_cosine
from tests.components.helpers import (
  PAIRS,
  build,
  check_mean_and_square,
  first_head_state,
)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.quick_every(2)
def test_arccos_mean_and_square(order):
  check_mean_and_square(build("arccos", order=order), 20_000)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.4])
@pytest.mark.quick_every(2)
def test_relu_mean_and_square(epsilon):
  check_mean_and_square(build("relu", epsilon=epsilon), 20_000)


def test_the_three_closed_forms():
  x, y = (PAIRS[:, side].astype(np.float64) for side in (0, 1))
  sizes = np.sqrt(np.sum(x**2, -1) * np.sum(y**2, -1))
  cosine = np.clip(np.sum(x * y, -1) / sizes, -1.0, 1.0)
  t = np.arccos(cosine)
  expected = (
    (np.pi - t) / (2 * np.pi),
    sizes * (np.sin(t) + (np.pi - t) * cosine) / (2 * np.pi),
    sizes**2
    * (3 * np.sin(t) * cosine + (np.pi - t) * (1 + 2 * cosine**2))
    / (2 * np.pi),
  )
  for order in range(3):
    value = np.exp(log_arc_cosine(PAIRS[:, 0], PAIRS[:, 1], order))
    np.testing.assert_allclose(value, expected[order], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("order", [3, 4])
def test_higher_orders_are_the_integral(order):
  # Unit vectors at angle t: r^order in polar coordinates.
  for t in (0.0, 0.7, 2.0, 3.0):
    integral, _ = scipy.integrate.quad(
      lambda u, t=t: (np.cos(u) * np.cos(u - t)) ** order,
      t - np.pi / 2,
      np.pi / 2,
    )
    radius = 2.0**order * np.prod(np.arange(1.0, order + 1))
    x, y = jnp.array([1.0, 0.0]), jnp.array([np.cos(t), np.sin(t)])
    value = jnp.exp(log_arc_cosine(x, y.astype(jnp.float32), order))
    # Near t = pi the terms cancel, in float32, to 1e-7 of their size.
    np.testing.assert_allclose(
      value, radius * integral / (2 * np.pi), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.quick_every(2)
def test_zero_vectors_have_kernel_zero(order):
  fm = build("arccos", num_features=8, order=order)
  variables = fm.init(jax.random.key(0), head_dim=4)
  zero, x = jnp.zeros(4), jnp.asarray(PAIRS[0, 0])
  assert float(fm.kernel(variables, zero, x)) == 0.0
  assert float(fm.kernel(variables, x, zero)) == 0.0
  phi = fm.apply(variables, zero[None, None], side="query")
  np.testing.assert_array_equal(phi, 0.0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(2)
def test_queries_without_a_positive_product_give_zeros(is_causal):
  # Without W and epsilon, disjoint supports have all products zero.
  fm = build("relu", "none", None, rows="none", epsilon=0.0)
  variables = fm.init(jax.random.key(0), head_dim=2)
  query = jnp.array([[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])[None, :, None]
  key = jnp.array([[-1.0, 1.0], [-2.0, 1.0], [-1.0, 3.0]])[None, :, None]
  value = jnp.ones((1, 3, 1, 1))

  def attend(query, key, value):
    out = sf.spectral_attention(
      query,
      key,
      value,
      feature_map=fm,
      variables=variables,
      is_causal=is_causal,
    )
    return jnp.sum(out), out

  grads, out = jax.grad(attend, (0, 1, 2), has_aux=True)(query, key, value)
  np.testing.assert_allclose(out[0, :, 0, 0], [0.0, 0.0, 1.0])
  assert all(bool(jnp.isfinite(g).all()) for g in grads)
  guarded = build("relu", "none", None, rows="none")
  out = sf.spectral_attention(
    query, key, value, feature_map=guarded, variables=variables
  )
  np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_relu_without_rows_is_exact_attention_of_its_kernel():
  fm = build("relu", "none", None, rows="none", epsilon=0.01)
  variables = fm.init(jax.random.key(0), head_dim=4)
  assert variables == ({}, {}) and fm.feature_dim is None
  query, key = jax.random.normal(jax.random.key(1), (2, 1, 6, 2, 4))
  weights = sf.implied_attention_weights(
    query, key, feature_map=fm, variables=variables
  )
  x, y = (np.moveaxis(np.asarray(a) * 4**-0.25, 2, 1) for a in (query, key))
  kernel = np.asarray(
    fm.component.kernel_value(x[..., :, None, :], y[..., None, :, :], None)
  )
  expected = kernel / kernel.sum(-1, keepdims=True)
  np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-7)
  phi, psi = (np.maximum(a, 0.0) + 0.01 for a in (x, y))
  np.testing.assert_allclose(kernel, phi @ np.swapaxes(psi, -1, -2), rtol=1e-5)
  moment = fm.component.log_second_moment(x, y, None)
  np.testing.assert_allclose(
    moment, 2 * np.log(np.sum(phi * psi, axis=-1)), rtol=1e-4
  )


def test_relu_has_low_variance():
  # Relative deviation of 128 rows at 32 dimensions: 0.07 to 0.2 on average.
  x, y = 0.5 * np.random.default_rng(0).normal(size=(2, 500, 32))
  component = build("relu", num_features=128, epsilon=0.0).component
  x, y = (a.astype(np.float32) for a in (x, y))
  state = first_head_state(build("relu"))
  log_kernel = np.log(component.kernel_value(x, y, state))
  moment = component.log_second_moment(x, y, state)
  variance = (np.exp(moment - 2 * log_kernel) - 1) / 128
  assert 0.05 < np.median(variance) < 0.09


@pytest.mark.parametrize(
  ("name", "matrix", "num_features", "kwargs", "words"),
  [
    ("arccos", "iid", 4, {"order": 3}, "order must be one of"),
    ("relu", "iid", 4, {"epsilon": -1e-3}, "epsilon must not be negative"),
    ("relu", "iid", 4, {"rows": "some"}, "rows must be one of"),
    ("relu", "none", None, {}, "needs rows of law 'gaussian'.*'none'"),
    ("relu", "orf", 4, {"rows": "none"}, "needs rows of law 'none'.*'orf'"),
    ("relu", "none", 4, {"rows": "none"}, "num_features must be None, got 4"),
  ],
)
def test_errors(name, matrix, num_features, kwargs, words):
  with pytest.raises(ValueError, match=words):
    build(name, matrix, num_features, **kwargs)


def decimal_sine(x, cosine=False):
  """Computes the sine (or cosine) of a Decimal, by its series."""
  total, term, n = Decimal(0), Decimal(1) if cosine else x, 0
  while abs(term) > Decimal(10) ** -75:
    total += term
    n += 2
    term *= -x * x / ((n - (1 if cosine else 0)) * (n + (0 if cosine else 1)))
  return total


def golden(degrees, order):
  """Computes E relu(w.x)^n relu(w.y)^n of unit vectors, to 60 digits."""
  with localcontext() as context:
    context.prec = 80
    pi = Decimal(
      "3.14159265358979323846264338327950288419716939937510582097494459230781640"
      "6286208998628"
    )
    t = Decimal(degrees) * pi / 180
    sin, cos, rest = decimal_sine(t), decimal_sine(t, cosine=True), pi - t
    polynomial = (
      rest,
      sin + rest * cos,
      3 * sin * cos + rest * (1 + 2 * cos**2),
      None,
      sin * cos * (55 + 50 * cos**2) + rest * (9 + 72 * cos**2 + 24 * cos**4),
    )[order]
    return float(polynomial / (2 * pi))


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_moments_keep_their_digits_near_opposite_vectors(order):
  for degrees in ("0", "60", "120", "175", "179", "179.9"):
    # The vector is rounded: its angle is taken from what it is.
    t = np.pi * float(degrees) / 180.0
    x, y = jnp.array([1.0, 0.0]), jnp.array([np.cos(t), np.sin(t)], np.float32)
    wide = np.asarray(y, np.float64)
    exact = Decimal(float(np.arctan2(wide[1], wide[0]))) * 180
    exact /= Decimal(float(np.pi))
    expected = golden(exact, order) * float(np.hypot(*wide)) ** order
    value = float(jnp.exp(log_arc_cosine(x, y, order)))
    np.testing.assert_allclose(value, expected, rtol=2e-4, err_msg=degrees)
  assert float(log_arc_cosine(x, -x, order)) == -np.inf
  grad = jax.grad(lambda x: jnp.exp(log_arc_cosine(x, -x, order)))(x)
  assert bool(jnp.isfinite(grad).all())
