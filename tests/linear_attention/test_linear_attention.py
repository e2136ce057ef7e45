"""Every implementation against the quadratic reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linear_attention import IMPLEMENTATIONS

# The Pallas kernels take no ready-made features: test_pallas.py tests them.
LINEAR = [
  name
  for name in IMPLEMENTATIONS
  if name != "reference" and not name.startswith("pallas")
]


def draw_features(length, dtype=jnp.float32, keys=None, batch=2, heads=2):
  """Positive features and values."""
  rngs = jax.random.split(jax.random.key(length), 3)
  keys = keys or length
  phi = jax.random.uniform(rngs[0], (batch, length, heads, 6), minval=0.1)
  psi = jax.random.uniform(rngs[1], (batch, keys, heads, 6), minval=0.1)
  value = jax.random.normal(rngs[2], (batch, keys, heads, 3))
  return tuple(a.astype(dtype) for a in (phi, psi, value))


def output_and_gradients(arrays, **kwargs):
  """Output, and gradients of a fixed weighting of it."""

  def loss(*arrays):
    out = sf.linear_attention(*arrays, **kwargs)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
    return jnp.sum(out.astype(jnp.float32) * weights.reshape(out.shape)), out

  (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)
  return out, grads


@pytest.mark.parametrize("implementation", LINEAR)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 100, 257])
@pytest.mark.quick_every(7)
def test_values_and_gradients(implementation, is_causal, masked, length):
  arrays = draw_features(length)
  kwargs = {"is_causal": is_causal}
  if masked:
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, length))
    kwargs["key_mask"] = mask.at[1].set(False)
  out, grads = output_and_gradients(
    arrays, implementation=implementation, chunk_size=32, **kwargs
  )
  expected, expected_grads = output_and_gradients(
    arrays, implementation="reference", **kwargs
  )
  np.testing.assert_allclose(out, expected, atol=2e-6)  # float32 sums
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, expected_grad, atol=2e-5)


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 100, 1000])
@pytest.mark.quick_every(2)
def test_chunk_size_does_not_matter(chunk_size):
  arrays = draw_features(100)
  out, _ = output_and_gradients(arrays, is_causal=True, chunk_size=chunk_size)
  expected, _ = output_and_gradients(
    arrays, is_causal=True, implementation="reference"
  )
  np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_bfloat16_inputs_are_summed_in_float32(is_causal):
  arrays = draw_features(257, jnp.bfloat16)
  out = sf.linear_attention(*arrays, is_causal=is_causal)
  assert out.dtype == jnp.bfloat16
  exact = sf.linear_attention(
    *(a.astype(jnp.float32) for a in arrays), is_causal=is_causal
  )
  # One rounding of the output, half a unit in the 8th bit.
  np.testing.assert_allclose(
    out.astype(jnp.float32), exact, rtol=2.0**-8, atol=1e-6
  )


@pytest.mark.slow
def test_cross_attention():
  arrays = draw_features(5, keys=9)
  out, grads = output_and_gradients(arrays)
  expected, expected_grads = output_and_gradients(
    arrays, implementation="reference"
  )
  np.testing.assert_allclose(out, expected, atol=2e-6)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, expected_grad, atol=2e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("poison", [jnp.nan, 1e30, -jnp.inf])
@pytest.mark.quick_every(4)
def test_padding_has_no_influence(is_causal, poison):
  phi, psi, value = draw_features(20)
  mask = jnp.arange(20)[None, :] < jnp.array([[13], [20]])
  hidden = ~mask[:, :, None, None]
  poisoned = (
    phi,
    jnp.where(hidden, poison, psi),
    jnp.where(hidden, poison, value),
  )
  clean = (phi, jnp.where(hidden, 1.0, psi), jnp.where(hidden, 1.0, value))
  out, grads = output_and_gradients(
    poisoned, is_causal=is_causal, key_mask=mask
  )
  expected, expected_grads = output_and_gradients(
    clean, is_causal=is_causal, key_mask=mask
  )
  np.testing.assert_array_equal(out, expected)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_array_equal(grad, expected_grad)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(2)
def test_no_visible_key_gives_zeros_and_zero_gradients(is_causal):
  mask = jnp.zeros((2, 9), bool)
  out, grads = output_and_gradients(
    draw_features(9), is_causal=is_causal, key_mask=mask
  )
  np.testing.assert_array_equal(out, 0.0)
  for grad in grads:
    np.testing.assert_array_equal(grad, 0.0)


def test_implementation_is_chosen_by_name():
  arrays = draw_features(4)
  with pytest.raises(ValueError, match="Did you mean 'reference'"):
    sf.linear_attention(*arrays, implementation="referense")
  out = sf.linear_attention(*arrays, implementation=("reference", "xla"))
  np.testing.assert_allclose(out, sf.linear_attention(*arrays), atol=2e-6)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5])
def test_chunk_size_must_be_positive(chunk_size):
  with pytest.raises(ValueError, match="chunk_size must be a positive integer"):
    sf.linear_attention(
      *draw_features(4), is_causal=True, chunk_size=chunk_size
    )


def test_causal_memory_does_not_grow_with_the_square():
  def temp_bytes(length):
    shape = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)

    def loss(phi, psi, value):
      return sf.linear_attention(phi, psi, value, is_causal=True).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape)
    return compiled.compile().memory_analysis().temp_size_in_bytes

  assert temp_bytes(4096) < 5 * temp_bytes(1024)
