"""What a query must not see reaches neither outputs nor gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.hybrid_attention.helpers import build_map, draw, hide

LENGTH = 26
REAL = hide(LENGTH, [0, 5, 24, 25])
EXACT = {"window": 3, "num_sinks": 2, "chunk_size": 8}
CASES = {
  "both ways": {**EXACT, "num_heavy": 3},
  "causal": {**EXACT, "is_causal": True},
  "sinks": {"num_sinks": 2, "is_causal": True, "chunk_size": 8},
  "packed": {
    **EXACT,
    "segment_ids": jnp.broadcast_to(jnp.arange(LENGTH) % 3, (2, LENGTH)),
  },
}


@functools.cache
def run(name, case):
  """Returns a function: outputs, and gradients of those with a weight."""

  def loss(arrays, weights):
    out = sf.spectral_attention(
      *arrays,
      key_mask=REAL,
      query_mask=REAL,
      **build_map(name),
      **CASES[case],
    )
    return jnp.sum(out * weights), out

  return jax.jit(jax.grad(loss, has_aux=True))


def weights_of(arrays):
  shape = (*arrays[0].shape[:3], 3)
  return np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


def first(tree, number, axis=1):
  """Returns the leading part of each leaf."""
  return [jnp.split(x, [number], axis)[0] for x in jax.tree.leaves(tree)]


def assert_same_bits(actual, expected):
  for got, want in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    np.testing.assert_array_equal(got, want)


PAIRS = [
  ("softmax", "both ways"),
  ("signed", "causal"),
  ("gaussian", "packed"),
  ("signed gaussian", "both ways"),
  ("gaussian", "causal"),
  ("tuned", "sinks"),
]


@pytest.mark.parametrize(("name", "case"), PAIRS)
@pytest.mark.quick_every(6)
def test_padding_is_never_seen(name, case):
  arrays = draw(LENGTH)
  weights, step = weights_of(arrays), run(name, case)
  expected = step(arrays, weights)
  grads, out = expected
  hidden = ~REAL[:, :, None, None]
  assert not np.asarray(jnp.where(hidden, out, 0.0)).any()
  for junk in (np.nan, np.inf, -1e30):
    dirty = [jnp.where(hidden, junk, x) for x in arrays]
    assert_same_bits(step(dirty, weights), expected)
  for grad in grads:
    assert not np.asarray(jnp.where(hidden, grad, 0.0)).any()
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(("name", "case"), PAIRS)
@pytest.mark.quick_every(4)
def test_neighbours_in_the_batch_do_not_matter(name, case):
  arrays = draw(LENGTH)
  weights, step = weights_of(arrays), run(name, case)
  changed = [x.at[1].multiply(-7.0) for x in arrays]
  before, after = step(arrays, weights), step(changed, weights)
  assert_same_bits(first(after, 1, axis=0), first(before, 1, axis=0))
  assert not np.allclose(after[1][1], before[1][1])


@pytest.mark.parametrize(
  ("name", "case"), [pair for pair in PAIRS if pair[1] in ("causal", "sinks")]
)
@pytest.mark.quick_every(6)
def test_the_future_is_never_seen(name, case):
  arrays, step = draw(LENGTH), run(name, case)
  for past in (2, 9, 20):
    # Only outputs of the past have a weight.
    weights = weights_of(arrays)
    weights[:, past:] = 0.0
    changed = [x.at[:, past:].multiply(-5.0) for x in arrays]
    before, after = step(arrays, weights), step(changed, weights)
    assert_same_bits(*(first(tree, past) for tree in (after, before)))
    for grad in (*before[0], *after[0]):
      assert not np.asarray(grad[:, past:]).any()
    assert not np.allclose(after[1][:, past:], before[1][:, past:])


def test_the_order_of_keys_does_not_matter_without_a_window():
  (query, key, value), mask = draw(LENGTH), REAL
  order = np.random.default_rng(0).permutation(LENGTH)
  attend = lambda key, value, mask: sf.spectral_attention(
    query, key, value, key_mask=mask, num_heavy=4, **build_map()
  )
  np.testing.assert_allclose(
    attend(key[:, order], value[:, order], mask[:, order]),
    attend(key, value, mask),
    atol=1e-5,
  )


@pytest.mark.parametrize("window", [3, None])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(4)
def test_a_packed_segment_is_as_if_alone(window, is_causal):
  arrays, maps = draw(30, groups=2), build_map()
  kwargs = {"window": window, "num_sinks": 2, "is_causal": is_causal, **maps}
  shown = hide(30, [0, 12, 13])
  sorted_ids, interleaved = np.arange(30) // 10, np.arange(30) % 3
  for ids in (sorted_ids, interleaved):
    out = sf.spectral_attention(
      *arrays,
      key_mask=shown,
      segment_ids=np.broadcast_to(ids, (2, 30)),
      **kwargs,
    )
    for segment in range(3):
      places = np.flatnonzero(ids == segment)
      alone = sf.spectral_attention(
        *(x[:, places] for x in arrays), key_mask=shown[:, places], **kwargs
      )
      np.testing.assert_allclose(out[:, places], alone, atol=2e-5)
