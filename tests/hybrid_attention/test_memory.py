"""Temporary memory of hybrid attention and its gradients."""

import jax
import jax.numpy as jnp
import pytest

import spectraformer_jax as sf

LENGTH, HEADS, HEAD_DIM = 16_384, 2, 32
# Exact keys, and how many times the memory without them is allowed.
CASES = {
  "both ways": ({"window": 63, "num_sinks": 4, "num_heavy": 32}, 4.0),
  "causal": ({"window": 127, "num_sinks": 4, "is_causal": True}, 2.5),
}


def temporary_bytes(num_features, **kwargs):
  """Returns the temporary bytes of value and gradients."""
  fm = sf.feature_map("posrf", "orf", num_features=num_features)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  shape = jax.ShapeDtypeStruct((1, LENGTH, HEADS, HEAD_DIM), jnp.float32)
  loss = lambda *arrays: jnp.sum(
    sf.spectral_attention(
      *arrays, feature_map=fm, variables=variables, **kwargs
    )
  )
  step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  compiled = step.lower(shape, shape, shape).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_of_values_and_gradients(case):
  exact, largest = CASES[case]
  without = {"is_causal": exact.get("is_causal", False)}
  few, many = (temporary_bytes(number, **exact) for number in (64, 256))
  assert few <= largest * temporary_bytes(64, **without)
  # The features of all queries and keys are never in memory at once.
  bytes_of_features = 2 * 4 * LENGTH * HEADS * (256 - 64)
  assert many - few < bytes_of_features / 4
