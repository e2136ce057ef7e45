"""Positional maps past the longest sequence that they can map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf

LONGEST = 4


def build():
  fm = sf.feature_map(
    "cosformer",
    "none",
    num_features=None,
    component_kwargs={"max_length": LONGEST, "epsilon": 0.1},
  )
  return fm, fm.init(jax.random.key(0), head_dim=4)


def decode(jit):
  """Decodes token by token, two tokens past the longest sequence."""
  fm, variables = build()
  x = jax.random.normal(jax.random.key(1), (LONGEST + 2, 1, 1, 2, 4))
  state = sf.init_state(fm, variables, batch_size=1, num_heads=2, head_dim=4)
  step = lambda state, x: sf.decode_step(
    state, x, x, x, feature_map=fm, variables=variables
  )
  step = jax.jit(step) if jit else step
  outs = []
  for token in x:
    out, state = step(state, token)
    outs.append(out)
  return x, jnp.concatenate(outs, axis=1)


def test_decoding_past_max_length_is_an_error_if_it_is_known():
  with pytest.raises(ValueError, match="max_length=4, got a sequence of len"):
    decode(jit=False)


def test_decoding_past_max_length_gives_nan_if_it_is_traced():
  x, out = decode(jit=True)
  assert bool(jnp.isnan(out[:, LONGEST:]).all())
  fm, variables = build()
  whole = jnp.concatenate(list(x[:LONGEST]), axis=1)
  expected = sf.spectral_attention(
    whole, whole, whole, feature_map=fm, variables=variables, is_causal=True
  )
  np.testing.assert_allclose(out[:, :LONGEST], expected, rtol=1e-4, atol=1e-5)


def test_length_of_a_state_counts_for_max_length():
  fm, variables = build()
  x = jnp.ones((1, 3, 2, 4))
  attend = lambda **kwargs: sf.spectral_attention(
    x,
    x,
    x,
    feature_map=fm,
    variables=variables,
    is_causal=True,
    return_state=True,
    **kwargs,
  )
  _, state = attend()
  with pytest.raises(ValueError, match="max_length=4, got a .* length 6"):
    attend(initial_state=state)


def test_features_at_a_known_position():
  fm, variables = build()
  x = jnp.ones((3, 1, 4))
  fm.log_features(variables, x, side="key", position=1)
  with pytest.raises(ValueError, match="max_length=4, got a .* length 5"):
    fm.log_features(variables, x, side="key", position=2)
