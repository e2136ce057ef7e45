"""Dropout: its rate, its mean, what shares random bits, its errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax.nn.dropout import Dropout


def drop_ones(rate, shape=(500, 400), seed=0, impl=None):
  """Dropped ones."""
  return np.asarray(
    Dropout(rate).apply(
      {},
      jnp.ones(shape),
      deterministic=False,
      rngs={"dropout": jax.random.key(seed, impl=impl)},
    )
  )


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("width", [400, 399, 1])
def test_rate_and_mean(rate, width):
  out = drop_ones(rate, (80_000 // width, width))
  dropped = out == 0.0
  error = np.sqrt(rate * (1 - rate) / out.size)
  assert abs(dropped.mean() - rate) < 4 * error + 2.0**-16
  np.testing.assert_allclose(out[~dropped], 1 / (1 - rate), rtol=1e-4)
  # Mean 1, to four standard errors.
  assert abs(out.mean() - 1.0) < 4 * error / (1 - rate)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_entries_are_independent(impl):
  dropped = drop_ones(0.5, impl=impl) == 0.0
  centred = dropped - 0.5
  parts = np.split(centred, 4)
  # Those whose bits are of one run of the generator, and neighbours.
  for a, b in (
    *itertools.combinations(parts, 2),
    (centred[:, 1:], centred[:, :-1]),
    (centred[1:], centred[:-1]),
  ):
    assert abs(4 * (a * b).mean()) < 4 / np.sqrt(a.size)


@pytest.mark.parametrize("shape", [(1000,), (3, 1000), (2, 3, 5, 100)])
def test_every_number_of_axes(shape):
  out = drop_ones(0.5, shape)
  assert out.shape == shape
  assert abs((out == 0.0).mean() - 0.5) < 4 * 0.5 / np.sqrt(out.size)


def test_examples_and_keys_have_masks_of_their_own():
  masks = [*drop_ones(0.5, (3, 40, 50)), *drop_ones(0.5, (3, 40, 50), seed=1)]
  for a, b in itertools.combinations(masks, 2):
    assert 0.4 < (a == b).mean() < 0.6  # by nine standard errors


def test_a_map_over_keys_drops_what_each_key_drops():
  def of_key(key):
    return Dropout(0.5).apply(
      {}, jnp.ones((7, 8)), deterministic=False, rngs={"dropout": key}
    )

  keys = jax.random.split(jax.random.key(0), 3)
  want = np.stack([of_key(key) for key in keys])
  np.testing.assert_array_equal(jax.jit(jax.vmap(of_key))(keys), want)


def test_no_rate_and_deterministic_change_nothing():
  np.testing.assert_array_equal(drop_ones(0.0), 1.0)
  x = jnp.ones((3, 4))
  out = Dropout(0.5).apply({}, x, deterministic=True)
  np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_rates_out_of_range(rate):
  with pytest.raises(ValueError, match=f"dropout rate.*{rate}"):
    drop_ones(rate)


def test_dtype_is_kept():
  out = Dropout(0.5).apply(
    {},
    jnp.ones((3, 4), jnp.bfloat16),
    deterministic=False,
    rngs={"dropout": jax.random.key(0)},
  )
  assert out.dtype == jnp.bfloat16
