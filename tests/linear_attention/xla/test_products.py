"""Operations whose gradients are written by hand, against plain autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linear_attention.normalize import divide
from spectraformer_jax.linear_attention.xla import products, results

# phi, psi [B, N, C, F]; kv [B, N, F, V]; value [B, N, C, V].
SHAPES = {"C": 5, "F": 7, "V": 3}


def draw(*letters, low=None):
  shape = (2, 3, *(SHAPES[letter] for letter in letters))
  rng = jax.random.key(sum(map(ord, "".join(letters))))
  if low is None:
    return jax.random.normal(rng, shape)
  return jax.random.uniform(rng, shape, minval=low)


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


@pytest.mark.parametrize("is_signed", [False, True])
def test_gradients_of_means(is_signed):
  sums, d_out = draw("C", "F", low=0.5), draw("C", "F")[..., :-1]
  magnitude = 1.5 * jnp.abs(sums[..., -1]) if is_signed else None
  sums = results.QuerySums(sums, magnitude)
  # A query without keys, and one whose weights have underflowed.
  sums = jax.tree.map(
    lambda x: x.at[0, 1, 2].set(0.0).at[1, 0, 3].set(0.0), sums
  )
  needs_weight = jnp.ones((2, 3, 5), bool).at[0, 1, 2].set(False)
  out, normalizer = results.mean(sums, needs_weight)
  assert not jnp.any(out[0, 1, 2])
  assert jnp.all(jnp.isnan(out[1, 0, 3]))
  d_out = d_out.at[1, 0, 3].set(0.0)
  out = jnp.nan_to_num(out)  # as `replace_unused` does where d_out is 0
  if normalizer is not None:
    normalizer = jnp.nan_to_num(normalizer, nan=1.0)
  actual = results.mean_vjp(sums, needs_weight, out, normalizer, d_out)

  def plain(sums):
    numerator, normalizer = sums.sums[..., :-1], sums.sums[..., -1:]
    if sums.magnitude is not None:
      floor = 1e-6 * sums.magnitude[..., None]
      normalizer = jnp.where(normalizer < floor, floor, normalizer)
    return divide(numerator, normalizer)

  expected = jax.vjp(plain, sums)[1](d_out)[0]
  assert not jnp.any(actual.sums[0, 1, 2])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    actual,
    expected,
  )


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
