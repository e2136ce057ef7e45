"""Products whose gradients are written by hand, against plain autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linear_attention.state import divide
from spectraformer_jax.linear_attention.xla import products

# phi, psi [B, N, C, F]; kv [B, N, F, V]; value [B, N, C, V].
SHAPES = {"C": 5, "F": 7, "V": 3}


def draw(*letters, low=None):
  shape = (2, 3, *(SHAPES[letter] for letter in letters))
  rng = jax.random.key(sum(map(ord, "".join(letters))))
  if low is None:
    return jax.random.normal(rng, shape)
  return jax.random.uniform(rng, shape, minval=low)


def side_by_side(out, normalizer):
  return jnp.concatenate([out, normalizer[..., None]], axis=-1)


def plain_mean(sums):
  return side_by_side(sums[..., :-1] / sums[..., -1:], sums[..., -1])


CASES = {
  "keys_times_values": (
    products.keys_times_values,
    lambda psi, value: jnp.einsum("bncf,bncv->bnfv", psi, value),
    (draw("C", "F"), draw("C", "V")),
  ),
  "queries_times_state": (
    products.queries_times_state,
    lambda phi, kv: jnp.einsum("bncf,bnfv->bncv", phi, kv),
    (draw("C", "F"), draw("F", "V")),
  ),
  "mean_of_values": (
    lambda sums: side_by_side(*products.mean_of_values(sums, None)),
    plain_mean,
    (draw("C", "F", low=0.5),),
  ),
  "mean_of_values, known": (
    lambda sums: side_by_side(
      *products.mean_of_values(
        sums, jax.lax.stop_gradient(products.mean_of_values(sums, None))
      )
    ),
    plain_mean,
    (draw("C", "F", low=0.5),),
  ),
}


def value_and_gradients(function, operands, jit=jax.jit):
  """The result, and gradients of a fixed weighting of it."""

  def loss(*operands):
    out = function(*operands)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
    return jnp.sum(out * weights.reshape(out.shape)), out

  arguments = tuple(range(len(operands)))
  (_, out), grads = jit(jax.value_and_grad(loss, arguments, has_aux=True))(
    *operands
  )
  return out, *grads


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
  function, plain, operands = CASES[name]
  actual = value_and_gradients(function, operands)
  expected = value_and_gradients(plain, operands)
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)  # float32 sums


def test_no_visible_key_gives_zeros_and_zero_gradients():
  sums = draw("C", "F", low=0.5).at[0, 1, 2, -1].set(0.0)
  mean = lambda sums: products.mean_of_values(sums, None)[0]
  out, gradient = value_and_gradients(mean, (sums,))
  assert not jnp.any(out[0, 1, 2])
  assert not jnp.any(gradient[0, 1, 2])
  expected = value_and_gradients(
    lambda sums: divide(sums[..., :-1], sums[..., -1:]), (sums,)
  )
  for a, e in zip((out, gradient), expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_two_positions(is_causal):
  # Where a turned operand stayed in columns XLA aborted the process, in the
  # program that a call outside of jit makes for the gradient.
  rngs = jax.random.split(jax.random.key(0), 3)
  operands = [
    jax.random.uniform(rng, (2, 2, 2, size), minval=0.1)
    for rng, size in zip(rngs, (6, 6, 3), strict=True)
  ]
  actual, expected = (
    value_and_gradients(
      functools.partial(
        sf.linear_attention, is_causal=is_causal, implementation=name
      ),
      operands,
      jit=lambda function: function,
    )
    for name in ("xla", "reference")
  )
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
