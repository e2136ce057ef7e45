"""Derivatives of any order and mode: of the engine, and where JAX may use them.

The oracle is `implementation="reference"`, which is plain JAX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.linear_attention.helpers import build_map, draw_arrays

LENGTH = 4


def line(component, is_causal, implementation=None, chunk_size=2):
  """A function of one number, along a random direction of all three arrays."""
  fm, variables = build_map(component)
  arrays, direction = draw_arrays(LENGTH), draw_arrays(LENGTH, scale=0.3)
  direction = jax.tree.map(lambda x: x[::-1], direction)

  def loss(t):
    moved = jax.tree.map(lambda x, d: x + t * d, arrays, direction)
    out = sf.spectral_attention(
      *moved,
      feature_map=fm,
      variables=variables,
      is_causal=is_causal,
      chunk_size=chunk_size,
      implementation=implementation,
    )
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
    return jnp.sum(out * weights.reshape(out.shape))

  return loss


def derivative(function, modes):
  """The derivative of a function of one number, in each mode in turn."""
  for mode in modes:
    function = mode(function)
  return jax.jit(function)(0.0)


REVERSE, FORWARD = jax.grad, jax.jacfwd


@pytest.mark.parametrize(
  "component, is_causal",
  [("posrf", False), ("posrf", True), ("trigrf", True), ("trigrf", False)],
)
@pytest.mark.quick_every(4)
def test_third_derivatives(component, is_causal):
  loss = line(component, is_causal)
  plain = line(component, is_causal, "reference")
  expected = derivative(plain, [FORWARD] * 3)
  assert abs(expected) > 1e-2
  np.testing.assert_allclose(
    derivative(loss, [REVERSE] * 3), expected, rtol=1e-3, atol=1e-4
  )


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("component", ["posrf", "trigrf"])
def test_every_order_of_modes(component, is_causal):
  loss = line(component, is_causal)
  plain = line(component, is_causal, "reference")
  for order in (1, 2, 3):
    expected = derivative(plain, [REVERSE] * order)
    for modes in {
      (REVERSE,) * order,
      (FORWARD,) * order,
      (REVERSE, FORWARD, REVERSE)[:order],
      (FORWARD, REVERSE, FORWARD)[:order],
    }:
      got = derivative(loss, modes)
      np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(4)
def test_products_with_the_hessian(implementation, is_causal):
  fm, variables = build_map("posrf")
  query, key, value = draw_arrays(LENGTH, batch=1)
  move = jnp.sin(jnp.arange(query.size, dtype=jnp.float32)).reshape(query.shape)

  def loss(query):
    out = sf.spectral_attention(
      query,
      key,
      value,
      feature_map=fm,
      variables=variables,
      is_causal=is_causal,
      implementation=implementation,
    )
    return jnp.sum(out**2)

  forward_over_reverse = jax.jvp(jax.grad(loss), (query,), (move,))[1]
  reverse_over_forward = jax.grad(
    lambda query: jax.jvp(loss, (query,), (move,))[1]
  )(query)
  reverse_over_reverse = jax.grad(
    lambda query: jnp.vdot(jax.grad(loss)(query), move)
  )(query)
  hessian = jax.hessian(loss)(query)
  expected = jnp.tensordot(hessian, move, 4)
  for got in (forward_over_reverse, reverse_over_forward, reverse_over_reverse):
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
  pushed = jax.linearize(loss, query)[1](move)
  np.testing.assert_allclose(
    pushed, jnp.vdot(jax.grad(loss)(query), move), rtol=1e-4
  )


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
def test_second_derivatives_through_a_scan_of_layers(is_causal):
  fm, variables = build_map("posrf")
  x = draw_arrays(LENGTH)[0]
  scales = jnp.array([0.7, 1.3, 0.9])
  attend = functools.partial(
    sf.spectral_attention,
    feature_map=fm,
    variables=variables,
    is_causal=is_causal,
    chunk_size=3,
  )

  def loss(t, in_loop):
    def layer(x, scale):
      return attend(scale * x, x, jnp.sin(x)), None

    x_moved = x * jnp.exp(t)
    if in_loop:
      return jnp.sum(jax.lax.scan(layer, x_moved, scales)[0] ** 2)
    for scale in scales:
      x_moved, _ = layer(x_moved, scale)
    return jnp.sum(x_moved**2)

  for modes in ([REVERSE] * 2, [FORWARD, REVERSE]):
    got, expected = (
      derivative(functools.partial(loss, in_loop=in_loop), modes)
      for in_loop in (True, False)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.slow
def test_gradients_of_many_at_once():
  fm, variables = build_map("posrf")
  query, key, value = draw_arrays(LENGTH, batch=3)

  def loss(query, value):
    out = sf.spectral_attention(
      query[None], key[:1], value, feature_map=fm, variables=variables
    )
    return jnp.sum(out**2)

  shared = value[:1]
  every = jax.vmap(loss, in_axes=(0, None))
  got = jax.grad(lambda q, v: jnp.sum(every(q, v)), (0, 1))(query, shared)
  one_by_one = [jax.grad(loss, (0, 1))(q, shared) for q in query]
  np.testing.assert_allclose(
    got[0], jnp.stack([d[0] for d in one_by_one]), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(
    got[1], sum(d[1] for d in one_by_one), rtol=1e-4, atol=1e-5
  )
