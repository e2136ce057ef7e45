"""All keys exact is exact attention; none is the estimate of old."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.hybrid_attention.helpers import assert_close, build_map, draw, hide

LENGTH = 20


@pytest.mark.parametrize(
  ("name", "case"),
  [
    ("gaussian", {"num_heavy": LENGTH}),
    ("softmax", {"window": LENGTH - 1}),
    ("signed", {"num_sinks": LENGTH + 3, "is_causal": True}),
    ("gaussian", {"window": (LENGTH - 1, 0), "is_causal": True}),
    ("softmax", {"window": 10 * LENGTH, "num_sinks": 2, "num_heavy": 3}),
    ("signed gaussian", {"num_sinks": 4, "num_heavy": LENGTH - 4}),
  ],
)
@pytest.mark.quick_every(6)
def test_all_keys_exact_is_exact_attention(name, case):
  arrays, maps = draw(LENGTH, groups=2, scale=1.5), build_map(name)
  shared = {
    "key_mask": hide(LENGTH, [0, 6]),
    "is_causal": case.get("is_causal", False),
  }
  kernel = maps["feature_map"].component.kernel

  def both(attention):
    def loss(arrays):
      out = attention(arrays)
      weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
      return jnp.sum(out * weights.reshape(out.shape)), out

    return jax.jit(jax.grad(loss, has_aux=True))(arrays)

  grads, out = both(
    lambda arrays: sf.spectral_attention(
      *arrays, chunk_size=8, **maps, **{**shared, **case}
    )
  )
  exact_grads, exact = both(
    lambda arrays: sf.exact_attention(*arrays, kernel=kernel, **shared)
  )
  assert_close(out, exact, 2e-5)
  assert_close(grads, exact_grads, 1e-4)


def test_no_exact_keys_is_the_same_program():
  (query, key, value), maps = draw(LENGTH), build_map()
  of_old = jax.jit(lambda x: sf.spectral_attention(x, key, value, **maps))
  none = jax.jit(
    lambda x: sf.spectral_attention(
      x, key, value, window=None, num_sinks=0, num_heavy=0, **maps
    )
  )
  assert none.lower(query).as_text() == of_old.lower(query).as_text()
  np.testing.assert_array_equal(none(query), of_old(query))


@pytest.mark.parametrize(
  "case",
  [
    {"window": 10**9, "num_heavy": 10**9},
    {"window": (10**9, 2), "num_sinks": 10**9, "is_causal": True},
  ],
)
def test_numbers_beyond_the_sequence_cost_nothing(case):
  (query, key, value), maps = draw(6), build_map()
  attend = jax.jit(
    lambda x, **kw: sf.spectral_attention(x, key, value, **kw, **maps),
    static_argnames=("window", "num_sinks", "num_heavy", "is_causal"),
  )
  # Arrays of 10^9 places would not fit.
  exact = sf.exact_attention(
    query, key, value, is_causal=case.get("is_causal", False)
  )
  assert_close(attend(query, **case), exact, 2e-5)
