"""exact_attention against a loop in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.kernels import EXACT_KERNELS
from spectraformer_jax.mixing_laws import ExpPower, Laplacian, build_law


def loop_attention(query, key, value, kernel, visible):
  """Computes attention in float64, one query and one key at a time."""
  query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
  scale = query.shape[-1] ** -0.25
  out = np.zeros((*query.shape[:3], value.shape[-1]))
  for b, t, n in np.ndindex(*query.shape[:3]):
    x = query[b, t, n] * scale
    total = 0.0
    for s in range(key.shape[1]):
      if visible[b, t, s]:
        y = key[b, s, n] * scale
        square = np.sum((x - y) ** 2)
        if kernel in ("softmax", "gaussian"):
          log_weight = x @ y if kernel == "softmax" else -0.5 * square
        else:  # tests/mixing_laws/test_laws.py compares these with scipy
          log_weight = build_law(kernel).log_kernel(jnp.float32(square))
        weight = np.exp(np.float64(log_weight))
        total += weight
        out[b, t, n] += weight * value[b, s, n]
    if total:
      out[b, t, n] /= total
  return out


def draw_inputs(rng, batch=2, queries=5, keys=5, heads=2, dim=4, value_dim=3):
  """Draws query, key and value."""
  rngs = jax.random.split(rng, 3)
  return (
    jax.random.normal(rngs[0], (batch, queries, heads, dim)),
    jax.random.normal(rngs[1], (batch, keys, heads, dim)),
    jax.random.normal(rngs[2], (batch, keys, heads, value_dim)),
  )


@pytest.mark.parametrize("kernel", ["softmax", "gaussian", "laplacian"])
@pytest.mark.parametrize("case", ["plain", "causal", "mask", "segments"])
def test_equals_the_loop(rng, kernel, case):
  query, key, value = draw_inputs(rng)
  visible = np.ones((2, 5, 5), bool)
  kwargs = {}
  if case == "causal":
    kwargs["is_causal"] = True
    visible = np.tril(visible)
  if case == "mask":
    mask = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    kwargs["key_mask"] = jnp.asarray(mask)
    visible = visible & mask[:, None, :]
  if case == "segments":
    ids = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    kwargs["segment_ids"] = jnp.asarray(ids)
    visible = ids[:, :, None] == ids[:, None, :]
  out = sf.exact_attention(query, key, value, kernel=kernel, **kwargs)
  expected = loop_attention(query, key, value, kernel, visible)
  np.testing.assert_allclose(out, expected, atol=2e-6)  # float32 sums


def test_softmax_equals_jax_nn(rng):
  query, key, value = draw_inputs(rng, value_dim=4)
  out = sf.exact_attention(query, key, value, is_causal=True)
  expected = jax.nn.dot_product_attention(query, key, value, is_causal=True)
  np.testing.assert_allclose(out, expected, atol=2e-6)


def test_cross_attention_with_a_pair_of_segment_ids(rng):
  query, key, value = draw_inputs(rng, queries=3)
  ids = (jnp.array([[0, 0, 1]] * 2), jnp.array([[0, 1, 1, 1, 0]] * 2))
  out = sf.exact_attention(query, key, value, segment_ids=ids)
  visible = np.asarray(ids[0])[:, :, None] == np.asarray(ids[1])[:, None, :]
  expected = loop_attention(query, key, value, "softmax", visible)
  np.testing.assert_allclose(out, expected, atol=2e-6)


def test_scale_and_dtype(rng):
  query, key, value = draw_inputs(rng)
  out = sf.exact_attention(query, key, value, scale=0.25)
  expected = sf.exact_attention(query * 0.5, key, value)  # 1/sqrt(4) = 0.5
  np.testing.assert_allclose(out, expected, atol=2e-6)
  low = sf.exact_attention(query, key, value.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("kernel", EXACT_KERNELS)
@pytest.mark.quick_every(3)
def test_every_kernel_is_exact_where_it_underflows(rng, kernel):
  query, key, value = draw_inputs(rng, batch=1, queries=4, keys=4)
  attend = functools.partial(sf.exact_attention, kernel=kernel)
  out = attend(query, key, value, is_causal=True)
  visible = np.tril(np.ones((1, 4, 4), bool))
  expected = loop_attention(query, key, value, kernel, visible)
  np.testing.assert_allclose(out, expected, atol=5e-6)  # float32 logarithms

  def loss(query, key):
    return jnp.sum(jnp.sin(attend(100.0 * query, 100.0 * key, value)))

  # At length scale 0.01, and with a query that is equal to a key.
  key = key.at[:, 1].set(query[:, 1])
  grads = jax.grad(loss, (0, 1))(query, key)
  assert all(bool(jnp.isfinite(grad).all()) for grad in grads)
  if kernel != "softmax":
    np.testing.assert_allclose(
      attend(100.0 * query, 100.0 * key, value)[:, 1],
      value[:, 1],
      # Power tails still see the other keys.
      atol=1e-6 if kernel in ("gaussian", "laplacian", "exp_power") else 0.5,
    )


def test_a_law_with_options_is_a_kernel(rng):
  inputs = draw_inputs(rng)
  np.testing.assert_array_equal(
    sf.exact_attention(*inputs, kernel=Laplacian()),
    sf.exact_attention(*inputs, kernel="laplacian"),
  )
  smooth, rough = (
    sf.exact_attention(*inputs, kernel=ExpPower(alpha)) for alpha in (1.8, 0.5)
  )
  assert float(jnp.max(jnp.abs(smooth - rough))) > 0.1


def test_no_visible_key_has_zero_gradient(rng):
  query, key, value = draw_inputs(rng)
  mask = jnp.zeros((2, 5), bool)
  grads = jax.grad(
    lambda *qkv: sf.exact_attention(*qkv, key_mask=mask).sum(), (0, 1, 2)
  )(query, key, value)
  for grad in grads:
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"key": (2, 5, 2, 6)}, "share head_dim"),
    ({"key": (2, 5, 3, 4)}, "share heads"),
    ({"value": (2, 4, 2, 3)}, "share length"),
    ({"query": (3, 5, 2, 4)}, "share batch"),
    ({"query": (5, 2, 4)}, "4 axes"),
    ({"key_mask": jnp.ones((2, 5, 5), bool)}, "use is_causal=True"),
    ({"key_mask": jnp.ones((2, 5), int)}, "must be boolean"),
    ({"kernel": "softmacks"}, "Did you mean 'softmax'"),
    ({"scale": -1.0}, "scale must be positive"),
    ({"segment_ids": jnp.ones((2, 4), int)}, "segment_ids must be"),
  ],
)
def test_errors_say_what_is_wrong(change, words):
  shapes = {"query": (2, 5, 2, 4), "key": (2, 5, 2, 4), "value": (2, 5, 2, 3)}
  kwargs = dict(change)
  arrays = {
    name: jnp.ones(kwargs.pop(name, shape)) for name, shape in shapes.items()
  }
  with pytest.raises(ValueError, match=words) as error:
    sf.exact_attention(**arrays, **kwargs)
  assert "\n" not in str(error.value)
