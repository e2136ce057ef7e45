"""Hybrid attention under JAX's transformations, other dtypes, empty arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.hybrid_attention.helpers import assert_close, build_map, draw, hide

EXACT = {"window": 2, "num_sinks": 1, "chunk_size": 4}
CASES = {
  "both ways": {**EXACT, "num_heavy": 2},
  "causal": {**EXACT, "is_causal": True},
  "packed": {
    **EXACT,
    "segment_ids": jnp.broadcast_to(jnp.arange(9) // 5, (2, 9)),
  },
}


def attend(arrays, case, name="softmax", **more):
  return sf.spectral_attention(
    *arrays, **build_map(name), **{**CASES[case], **more}
  )


@pytest.mark.parametrize("name", ["softmax", "signed"])
@pytest.mark.parametrize("case", ["both ways", "causal", "packed"])
@pytest.mark.slow
def test_derivatives_in_every_mode(name, case):
  # Heavy keys do not change within the step of a derivative.
  arrays, move = draw(9, scale=0.5), draw(9, seed=1, scale=0.3)

  def line(t, **more):
    moved = jax.tree.map(lambda x, d: x + t * d, arrays, move)
    out = attend(moved, case, name, **more)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
    return jnp.sum(out * weights.reshape(out.shape))

  plain = functools.partial(line, implementation="reference")
  first, second = (
    jax.jit(f)(0.0) for f in (jax.grad(plain), jax.grad(jax.grad(plain)))
  )
  assert abs(second) > 1e-2
  np.testing.assert_allclose(jax.jvp(line, (0.0,), (1.0,))[1], first, rtol=1e-4)
  # The product of the Hessian and `move`, forward over reverse and back.
  for modes in ((jax.grad, jax.jacfwd), (jax.grad, jax.grad)):
    function = line
    for mode in modes:
      function = mode(function)
    np.testing.assert_allclose(jax.jit(function)(0.0), second, rtol=1e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(3)
def test_vmap_is_a_loop(case):
  arrays = [jnp.stack([x, -x, 0.5 * x]) for x in draw(9)]
  got = jax.vmap(lambda *one: attend(one, case))(*arrays)
  for index in range(3):
    assert_close(got[index], attend([x[index] for x in arrays], case), 1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(3)
def test_bfloat16_is_rounded_once(case):
  arrays = [x.astype(jnp.bfloat16) for x in draw(9)]
  expected = attend([x.astype(jnp.float32) for x in arrays], case)
  out = attend(arrays, case)
  assert out.dtype == jnp.bfloat16
  # bfloat16 has 8 bits; sums and weights are float32.
  np.testing.assert_allclose(out, expected, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("case", ["both ways", "causal"])
@pytest.mark.parametrize("axis", ["batch", "length", "keys", "value"])
def test_empty_arrays(case, axis):
  query, key, value = draw(4)
  if axis == "batch":
    query, key, value = (x[:0] for x in (query, key, value))
  elif axis == "length":
    query, key, value = (x[:, :0] for x in (query, key, value))
  elif axis == "keys":
    key, value = key[:, :0], value[:, :0]
  else:
    value = value[..., :0]
  more = {"window": None} if axis == "keys" else {}
  out = attend((query, key, value), case, **more)
  assert out.shape == (*query.shape[:3], value.shape[-1])
  assert not np.asarray(out).any()


def test_no_tokens_leave_the_state():
  query, key, value = draw(4)
  kwargs = {**CASES["causal"], "return_state": True, **build_map()}
  _, state = sf.spectral_attention(query, key, value, **kwargs)
  nothing = [x[:, :0] for x in (query, key, value)]
  out, after = sf.spectral_attention(*nothing, initial_state=state, **kwargs)
  assert out.shape == (2, 0, 2, 3)
  jax.tree.map(np.testing.assert_array_equal, after, state)


def test_queries_without_a_key_give_zeros_and_no_gradient():
  arrays = draw(9)
  mask = hide(9, [0, 1]).at[1].set(False)

  def loss(arrays):
    out = attend(arrays, "causal", key_mask=mask)
    return jnp.sum(out**2), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
  assert not np.asarray(out[0, :2]).any() and not np.asarray(out[1]).any()
  for grad in grads:
    assert np.isfinite(grad).all() and not np.asarray(grad[1]).any()


@pytest.mark.slow
def test_the_scale_may_be_an_array_with_a_gradient():
  arrays = draw(9)
  loss = lambda scale: jnp.sum(attend(arrays, "both ways", scale=scale) ** 2)
  got = jax.grad(loss)(0.3)
  step = 1e-2
  slope = (loss(0.3 + step) - loss(0.3 - step)) / (2 * step)
  np.testing.assert_allclose(loss(jnp.asarray(0.3)), loss(0.3), rtol=1e-5)
  np.testing.assert_allclose(got, slope, rtol=2e-2)
