"""A state carries exact keys: any split of a sequence equals one pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.hybrid_attention.helpers import assert_close, build_map, draw, hide

LENGTH = 24
STEP = "step"


@functools.cache
def step_of(name):
  return jax.jit(functools.partial(sf.decode_step, **build_map(name)))


def empty(maps, **exact):
  return sf.init_state(
    **maps, batch_size=2, num_heads=2, head_dim=4, value_dim=3, **exact
  )


def in_pieces(arrays, name, splits, key_mask=None, **exact):
  """Attends piece by piece; `STEP` stands for one token by `decode_step`."""
  state, outs, start = empty(build_map(name), **exact), [], 0
  for length in splits:
    end = start + (1 if length == STEP else length)
    piece = [x[:, start:end] for x in arrays]
    if length == STEP:
      out, state = step_of(name)(state, *piece)
    else:
      out, state = sf.spectral_attention(
        *piece,
        key_mask=None if key_mask is None else key_mask[:, start:end],
        is_causal=True,
        initial_state=state,
        return_state=True,
        chunk_size=8,
        **build_map(name),
        **exact,
      )
    start = end
    outs.append(out)
    assert int(state.length) == end
  assert start == LENGTH
  return jnp.concatenate(outs, axis=1), state


def one_pass(arrays, name, key_mask=None, **exact):
  return sf.spectral_attention(
    *arrays,
    key_mask=key_mask,
    is_causal=True,
    return_state=True,
    **build_map(name),
    **exact,
  )


def steps(number):
  return (STEP,) * number


@pytest.mark.parametrize(
  ("name", "exact"),
  [
    ("softmax", {"window": 5, "num_sinks": 6}),
    ("gaussian", {"window": 0, "num_sinks": 1}),
    ("tuned", {"num_sinks": 4}),
    ("softmax", {"window": 40}),
    ("gaussian", {"window": (7, 3), "num_sinks": 2}),
    ("signed", {"window": 5, "num_sinks": 2}),
  ],
)
@pytest.mark.quick_every(6)
def test_splits_and_steps_equal_one_pass(name, exact):
  # Two pieces that are shorter than the window, and than the sinks, and one
  # that is padded to a multiple of the chunk.
  arrays = draw(LENGTH, groups=2, scale=0.5)
  expected, after = one_pass(arrays, name, **exact)
  out, state = in_pieces(arrays, name, (3, 4, 11, *steps(6)), **exact)
  assert_close(out, expected)
  for got, want in zip(state[1:], after[1:], strict=True):
    if want is not None:
      np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
  "splits",
  [
    steps(24),
    (10, *steps(14)),
    (1, 2, 21),
    (2, 3, 19),
    (11, 13),
    (20, 3, *steps(1)),
  ],
)
@pytest.mark.parametrize("name", ["softmax", "gaussian", "signed"])
@pytest.mark.parametrize(
  "exact",
  [
    {"window": 5, "num_sinks": 6},
    {"window": 0},
    {"num_sinks": 3},
    {"window": 9},
    {"window": 1, "num_sinks": 1},
  ],
)
def test_every_split(name, exact, splits):
  arrays = draw(LENGTH, groups=2, scale=0.5)
  expected, _ = one_pass(arrays, name, **exact)
  assert_close(in_pieces(arrays, name, splits, **exact)[0], expected)


@pytest.mark.parametrize("splits", [(2, 3, 19), (7, 17), (1, 1, 1, 21)])
@pytest.mark.quick_every(3)
def test_masked_tokens_are_neither_sinks_nor_near(splits):
  arrays, exact = draw(LENGTH), {"window": 5, "num_sinks": 4}
  key_mask = hide(LENGTH, [0, 2, 8, 9, 21])
  expected, after = one_pass(arrays, "softmax", key_mask, **exact)
  out, state = in_pieces(arrays, "softmax", splits, key_mask, **exact)
  assert_close(out, expected)
  np.testing.assert_array_equal(state.ring_visible, after.ring_visible)
  assert state.sink_count.tolist() == [[4], [4]]


def test_the_state_does_not_grow():
  arrays, maps = draw(LENGTH), build_map()
  state = empty(maps, window=5, num_sinks=6)
  structure = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert state.ring_key.shape == state.ring_value.shape[:3] + (4,)
  assert state.ring_key.shape[2] == 5 and state.sink_key.shape[2] == 6
  for t in range(8):
    state = step_of("softmax")(state, *(x[:, t : t + 1] for x in arrays))[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure


def test_a_window_of_zero_is_not_no_window():
  zero, none = (
    empty(build_map(), window=window, num_sinks=1) for window in (0, None)
  )
  assert zero.ring_key.shape[2] == 0 and none.ring_key is None
  assert zero.exact_keys.window == (0, 0) and none.exact_keys.window is None


def test_keys_are_kept_in_their_own_dtype():
  arrays = [x.astype(jnp.bfloat16) for x in draw(8)]
  out, state = one_pass(arrays, "softmax", window=3, num_sinks=2)
  assert out.dtype == jnp.bfloat16
  for kept in (state.ring_key, state.ring_value, state.sink_key):
    assert kept.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    state.ring_key, jnp.swapaxes(arrays[1][:, -3:], 1, 2)
  )
  np.testing.assert_array_equal(
    state.sink_value, jnp.swapaxes(arrays[2][:, :2], 1, 2)
  )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_gradients_flow_through_a_state(implementation):
  arrays, exact = draw(LENGTH), {"window": 5, "num_sinks": 6}
  kwargs = {"is_causal": True, "implementation": implementation, **exact}
  kwargs |= build_map()
  weights = jnp.cos(jnp.arange(2 * LENGTH * 2 * 3, dtype=jnp.float32))
  weights = weights.reshape(2, LENGTH, 2, 3)

  def split_loss(arrays):
    out, state = sf.spectral_attention(
      *(x[:, :4] for x in arrays), return_state=True, **kwargs
    )
    rest = sf.spectral_attention(
      *(x[:, 4:] for x in arrays), initial_state=state, **kwargs
    )
    return jnp.sum(weights * jnp.concatenate([out, rest], axis=1))

  whole_loss = lambda arrays: jnp.sum(
    weights * sf.spectral_attention(*arrays, **kwargs)
  )
  grads = [jax.jit(jax.grad(f))(arrays) for f in (split_loss, whole_loss)]
  assert_close(*grads, 3e-5)
