"""Rotary positions, and what the other options of the encoder change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.nn.positions import sinusoids
from spectraformer_jax.nn.sequence_encoder import BatchNorm, weighted_mean
from tests.nn.helpers import normal


def encode(x, mask=None, **options):
  """A small encoder of vectors, applied to x."""
  fm = sf.feature_map("posrf", "orf", num_features=16)
  encoder = sf.nn.Encoder(head_dim=8, feature_map=fm, **options)
  variables = encoder.init(jax.random.key(0), x, mask)
  return encoder.apply(variables, x, mask), variables["params"]


def test_a_table_of_positions_starts_from_sinusoids():
  sizes = {"vocab_size": 4, "num_classes": 2, "max_len": 9, "embed_dim": 6}
  fm = sf.feature_map("posrf", "orf", num_features=16)
  model = sf.nn.Classifier(**sizes, positions="sinusoidal", feature_map=fm)
  tokens, length = jnp.ones((1, 5), int), jnp.array([5])
  variables = model.init(jax.random.key(0), tokens, length)
  table = variables["params"]["position_embedding"]
  assert table.shape == (9, 6)
  np.testing.assert_allclose(table, 0.02 * sinusoids(9, 6), rtol=1e-6)
  square = np.mean(np.square(sinusoids(9, 6)), axis=1)
  np.testing.assert_allclose(square, 1.0, rtol=1e-5)
  assert sinusoids(9, 5).shape == (9, 5)


def test_batch_norm_leaves_what_examples_differ_in():
  x = 7.0 + 0.1 * normal(0, 256, 3)
  norm = BatchNorm()
  variables = norm.init(jax.random.key(0), x)
  apply = lambda variables, **options: norm.apply(
    variables, x, mutable=["feature_stats"], **options
  )
  y, updated = apply(variables, deterministic=False)
  np.testing.assert_allclose(y.mean(axis=0), 0.0, atol=1e-2)
  np.testing.assert_allclose(y.std(axis=0), 1.0, rtol=1e-2)
  for _ in range(200):
    _, updated = apply({**variables, **updated}, deterministic=False)
  np.testing.assert_allclose(apply({**variables, **updated})[0], y, atol=1e-2)


def test_products_of_rotated_vectors_depend_on_the_distance_alone():
  query, key = normal(0, 1, 6, 2, 8), normal(1, 1, 6, 2, 8)
  product = lambda shift: jnp.einsum(
    "btnh,bsnh->bnts",
    sf.nn.rotate(query, jnp.arange(6) + shift),
    sf.nn.rotate(key, jnp.arange(6) + shift),
  )
  # Angles up to 1000 have 6e-5 of rounding in float32.
  np.testing.assert_allclose(product(0), product(1000), atol=2e-3)
  turned = sf.nn.rotate(query, jnp.arange(6))
  assert float(jnp.abs(turned - query)[:, 1:].max()) > 0.1
  np.testing.assert_allclose(
    jnp.linalg.norm(turned, axis=-1),
    jnp.linalg.norm(query, axis=-1),
    rtol=1e-5,
  )


def test_rotation_of_one_pair():
  x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
  for position in (0, 3):
    slow = position / 100.0  # 1e4 ** (-1 / 2)
    expected = [
      np.cos(position) - 3.0 * np.sin(position),
      2.0 * np.cos(slow) - 4.0 * np.sin(slow),
      3.0 * np.cos(position) + np.sin(position),
      4.0 * np.cos(slow) + 2.0 * np.sin(slow),
    ]
    found = sf.nn.rotate(x, jnp.array([position]))
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5)


def test_packed_rows_equal_rows_apart_where_positions_start_again():
  fm = sf.feature_map("posrf", "orf", num_features=16)
  variables = fm.init(jax.random.key(0), head_dim=8, num_heads=2)
  query, key, value = (normal(seed, 1, 9, 2, 8) for seed in range(3))
  attend = lambda q, k, v, positions, **kwargs: sf.spectral_attention(
    sf.nn.rotate(q, positions),
    sf.nn.rotate(k, positions),
    v,
    feature_map=fm,
    variables=variables,
    **kwargs,
  )
  positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
  segments = jnp.array([[0] * 4 + [1] * 5])
  packed = attend(query, key, value, positions, segment_ids=segments)
  for start, stop in ((0, 4), (4, 9)):
    rows = (x[:, start:stop] for x in (query, key, value))
    apart = attend(*rows, jnp.arange(stop - start))
    np.testing.assert_allclose(packed[:, start:stop], apart, atol=1e-5)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.quick_every(2)
def test_only_positions_tell_the_order(rotary):
  x = normal(0, 1, 6, 16)
  out, _ = encode(x, rotary=rotary)
  back, _ = encode(x[:, ::-1], rotary=rotary)
  same = np.allclose(back[:, ::-1], out, atol=1e-5)
  assert same == (not rotary)


def test_norm_comes_before_or_after():
  x = 100.0 * normal(0, 1, 6, 16)
  pre, params = encode(x)
  post, post_params = encode(x, norm="post")
  assert "norm" in params and "norm" not in post_params
  np.testing.assert_allclose(jnp.mean(post, axis=-1), 0.0, atol=1e-5)
  np.testing.assert_allclose(jnp.std(post, axis=-1), 1.0, atol=1e-3)
  assert float(jnp.abs(pre - post).max()) > 0.1


@pytest.mark.slow
def test_gated_mlp_is_the_formula():
  x = normal(0, 1, 3, 16)
  fm = sf.feature_map("posrf", "orf", num_features=16)
  layer = sf.nn.EncoderLayer(
    head_dim=8, mlp_dim=12, feature_map=fm, mlp="gated"
  )
  variables = layer.init(jax.random.key(0), x)
  params = jax.tree.map(
    lambda leaf: leaf + 0.1 * normal(2, *leaf.shape), variables["params"]
  )
  # Without attention only the MLP is left.
  out = params["attention"]["out"]
  params["attention"]["out"] = jax.tree.map(jnp.zeros_like, out)
  found = layer.apply({**variables, "params": params}, x)
  x, params = np.asarray(x), jax.tree.map(np.asarray, params)

  def dense(name, y):
    return y @ params[name]["kernel"] + params[name]["bias"]

  centred = x - x.mean(-1, keepdims=True)
  y = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6)
  y = y * params["LayerNorm_1"]["scale"] + params["LayerNorm_1"]["bias"]
  gate = dense("gate", y)
  expected = x + dense(
    "Dense_1", gate / (1.0 + np.exp(-gate)) * dense("Dense_0", y)
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_attention_pooling_sees_real_positions_only():
  x, score = normal(0, 2, 5, 4), normal(1, 2, 5, 1)
  mask = jnp.array([[True, True, False, False, False], [False] * 5])
  weight = jnp.exp(score[0, :2]) / jnp.exp(score[0, :2]).sum()
  found = weighted_mean(x, score.at[:, 3].set(1e4), mask)
  np.testing.assert_allclose(found[0], (weight * x[0, :2]).sum(0), atol=1e-6)
  np.testing.assert_array_equal(found[1], 0.0)
