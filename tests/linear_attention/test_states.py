"""Prefill, decoding, and gradients through a state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.linear_attention.helpers import (
  CAUSAL,
  assert_close,
  build_map,
  draw_arrays,
  output_and_gradients,
)


@pytest.mark.parametrize("component", CAUSAL)
@pytest.mark.parametrize("splits", [(1, 29), (13, 17), (16, 13, 1)])
@pytest.mark.quick_every(4)
def test_prefill_and_decoding_equal_one_pass(component, splits):
  fm, variables = build_map(component, **CAUSAL[component])
  arrays = draw_arrays(30, scale=2.0)
  kwargs = {"feature_map": fm, "variables": variables}
  expected = sf.spectral_attention(*arrays, is_causal=True, **kwargs)
  state = sf.init_state(
    fm, variables, batch_size=2, num_heads=2, head_dim=4, value_dim=3
  )
  outs, start = [], 0
  for length in splits:
    piece = [a[:, start : start + length] for a in arrays]
    start += length
    if length == 1:
      out, state = sf.decode_step(state, *piece, **kwargs)
    else:
      out, state = sf.spectral_attention(
        *piece,
        is_causal=True,
        initial_state=state,
        return_state=True,
        chunk_size=8,
        **kwargs,
      )
    outs.append(out)
  assert int(state.length) == 30
  tolerance = 1e-2 if component == "trigrf" else 3e-5
  assert_close(jnp.concatenate(outs, axis=1), expected, tolerance)


def test_decoding_token_by_token_does_not_grow_the_state():
  fm, variables = build_map()
  arrays = draw_arrays(12, scale=3.0)
  kwargs = {"feature_map": fm, "variables": variables}
  expected = sf.spectral_attention(*arrays, is_causal=True, **kwargs)
  state = sf.init_state(
    fm, variables, batch_size=2, num_heads=2, head_dim=4, value_dim=3
  )
  shapes = jax.tree.map(jnp.shape, state)
  step = jax.jit(functools.partial(sf.decode_step, **kwargs))
  for t in range(12):
    out, state = step(state, *(a[:, t : t + 1] for a in arrays))
    assert_close(out, expected[:, t : t + 1])
  assert jax.tree.map(jnp.shape, state) == shapes


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(2)
def test_gradients_flow_through_a_state(is_causal):
  fm, variables = build_map()
  first, second = draw_arrays(9), draw_arrays(14)
  kwargs = {"feature_map": fm, "variables": variables, "return_state": True}
  _, state = sf.spectral_attention(*first, is_causal=True, **kwargs)
  actual = output_and_gradients(
    second, fm, variables, state, is_causal=is_causal, chunk_size=4
  )
  expected = output_and_gradients(
    second,
    fm,
    variables,
    state,
    is_causal=is_causal,
    implementation="reference",
  )
  assert_close(actual, expected)


@pytest.mark.slow
def test_gradients_reach_what_made_the_state():
  fm, variables = build_map()
  arrays = draw_arrays(20)

  def loss(split, *arrays):
    first = [a[:, :split] for a in arrays]
    rest = [a[:, split:] for a in arrays]
    kwargs = {"feature_map": fm, "variables": variables, "is_causal": True}
    if not split:
      return jnp.sum(sf.spectral_attention(*rest, **kwargs)[:, 11:] ** 2)
    _, state = sf.spectral_attention(*first, return_state=True, **kwargs)
    out = sf.spectral_attention(*rest, initial_state=state, **kwargs)
    return jnp.sum(out**2)

  whole = jax.grad(loss, (1, 2, 3))(0, *arrays)
  split = jax.grad(loss, (1, 2, 3))(11, *arrays)
  assert_close(split, whole)


def decode_one_key(num_tokens, weight):
  """Worst error of decoding one key, its value 0 before and then 1.

  Args:
    num_tokens: that are decoded with value 1.
    weight: how often the key was seen before.
  """
  fm, variables = build_map(num_heads=1)
  key = draw_arrays(1, batch=1, key_heads=1)[1]
  one = jnp.ones((1, 1, 1, 1))
  kwargs = {"feature_map": fm, "variables": variables}
  state = sf.init_state(
    **dict(kwargs, batch_size=1, num_heads=1, head_dim=4, value_dim=1)
  )
  _, state = sf.decode_step(state, key, key, 0 * one, **kwargs)
  state = state._replace(kv=state.kv * weight, total=state.total * weight)

  def step(state, _):
    out, state = sf.decode_step(state, key, key, one, **kwargs)
    return state, out[0, 0, 0, 0]

  _, out = jax.jit(lambda state: jax.lax.scan(step, state, length=num_tokens))(
    state
  )
  seen = np.arange(1, num_tokens + 1)
  return np.max(np.abs(out / (seen / (weight + seen)) - 1.0))


def test_rounding_of_many_equal_tokens_does_not_add_up():
  # Each token is rounded the same way: the sums' last bits are a 16th of it.
  assert decode_one_key(2000, 2.0**20) < 1e-4


@pytest.mark.slow
def test_a_million_equal_tokens():
  assert decode_one_key(2**20, 2.0**19) < 1e-4


def test_states_without_a_rest_are_taken():
  fm, variables = build_map()
  arrays = draw_arrays(6)
  kwargs = {"feature_map": fm, "variables": variables, "is_causal": True}
  _, state = sf.spectral_attention(*arrays, return_state=True, **kwargs)
  out = []
  for rest in (state.rest, None):
    token = [x[:, :1] for x in arrays]
    got, after = sf.decode_step(
      state._replace(rest=rest), *token, feature_map=fm, variables=variables
    )
    assert (after.rest is None) == (rest is None)
    out.append(got)
  np.testing.assert_allclose(*out, rtol=1e-6)
