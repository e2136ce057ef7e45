"""Maps without a weight matrix, and RFA: kernels and attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.components.helpers import (
  PAIRS,
  build,
  check_mean_and_square,
  first_head_state,
)


def build_exact(name, **kwargs):
  """Builds a map without rows, and its variables for 2 heads of 4."""
  fm = build(name, "none", None, **kwargs)
  return fm, fm.init(jax.random.key(0), head_dim=4, num_heads=2)


def draw_inputs(num_queries=7, num_keys=7, scale=1.0):
  """Draws query, key and value ``[1, L, 2, 4]``."""
  rngs = jax.random.split(jax.random.key(3), 3)
  return tuple(
    scale * jax.random.normal(rng, (1, length, 2, 4))
    for rng, length in zip(rngs, (num_queries, num_keys, num_keys), strict=True)
  )


def elu1(x):
  """Computes elu(x) + 1 in float64, of unscaled vectors."""
  return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


COSFORMER = {"max_length": 10, "epsilon": 0.02}


def expected_weights(name, query, key):
  """Computes the T x S weights as in the papers, in float64."""
  q, k = (np.moveaxis(np.asarray(a, np.float64), 2, 1) for a in (query, key))
  dot = lambda a, b: a @ np.swapaxes(b, -1, -2)
  if name == "elu1":
    kernel = dot(elu1(q), elu1(k))
  elif name == "cosformer":
    distance = np.arange(q.shape[2])[:, None] - np.arange(k.shape[2])[None, :]
    r = [np.maximum(a, 0) / np.sqrt(2) + 0.02 for a in (q, k)]  # H^-1/4
    kernel = dot(*r) * np.cos(np.pi * distance / 20)
  else:
    score = dot(q, k) / 2.0  # 1 / sqrt(H)
    kernel = 1 + score + score**2 / 2
  return kernel / kernel.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", ["elu1", "cosformer", "taylor2"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
def test_attention_is_that_of_the_exact_kernel(name, scale):
  fm, variables = build_exact(
    name, **(COSFORMER if name == "cosformer" else {})
  )
  query, key, _ = draw_inputs(9, 6, scale)
  weights = sf.implied_attention_weights(
    query, key, feature_map=fm, variables=variables
  )
  np.testing.assert_allclose(
    weights, expected_weights(name, query, key), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("name", ["elu1", "cosformer", "taylor2"])
def test_features_multiply_to_the_kernel(name):
  fm, variables = build_exact(name)
  x, y = (jnp.asarray(PAIRS[:, side, None, None, :]) for side in (0, 1))
  one = fm.init(jax.random.key(0), head_dim=4)
  phi = fm.apply(one, x, side="query")
  psi = fm.apply(one, y, side="key")
  kernel = fm.kernel(variables, x[:, 0, 0], y[:, 0, 0])
  np.testing.assert_allclose(
    jnp.sum(phi * psi, axis=-1)[:, 0, 0], kernel, rtol=1e-5, atol=1e-7
  )
  size = {"elu1": 4, "cosformer": 8, "taylor2": 21}[name]
  assert phi.shape[-1] == size == fm.component.feature_dim(None, 4)
  assert fm.feature_dim is None and not jax.tree.leaves(variables)


def test_elu1_is_positive_however_negative_the_input():
  fm, variables = build_exact("elu1")
  x = jnp.full((1, 3, 2, 4), -1e4)
  log_phi = fm.log_features(variables, x, side="key")
  assert fm.info.positive and log_phi.factor is None
  assert bool(jnp.isfinite(log_phi.log_magnitude).all())
  # exp(-2.8e4) is 0 in float32, attention to equal keys is not.
  weights = sf.implied_attention_weights(
    x, x, feature_map=fm, variables=variables
  )
  np.testing.assert_allclose(weights, 1 / 3, rtol=1e-5)


def test_taylor2_normalizers_are_at_least_half_the_keys():
  fm, variables = build_exact("taylor2")
  x, y = jax.random.normal(jax.random.key(1), (2, 500, 4))
  assert float(fm.kernel(variables, x, y).min()) >= 0.5
  opposite = jnp.array([1.0, 0.0, 0.0, 0.0])
  assert float(fm.kernel(variables, opposite, -opposite)) == 0.5


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(2)
def test_cosformer_knows_positions(is_causal):
  fm, variables = build_exact("cosformer", max_length=10, epsilon=0.05)
  query, key, value = draw_inputs()
  kwargs = {
    "feature_map": fm,
    "variables": variables,
    "is_causal": is_causal,
    "chunk_size": 3,
  }
  out = sf.spectral_attention(query, key, value, **kwargs)
  # Padding changes nothing, as the length is fixed.
  pad = lambda a: jnp.pad(a, ((0, 0), (0, 3), (0, 0), (0, 0)))
  mask = jnp.arange(10)[None, :] < 7
  padded = sf.spectral_attention(
    pad(query), pad(key), pad(value), key_mask=mask, **kwargs
  )
  np.testing.assert_allclose(padded[:, :7], out, atol=1e-6)
  # A shift of all positions changes nothing; the order of keys does.
  phi, psi = (
    fm.apply(variables, x, side=side)
    for x, side in ((query, "query"), (key, "key"))
  )
  later = [
    fm.log_features(variables, x, side=side, position=2)
    for x, side in ((query, "query"), (key, "key"))
  ]
  later = [f.factor * jnp.exp(f.log_magnitude) for f in later]
  products = lambda a, b: jnp.einsum("btnf,bsnf->bnts", a, b)
  np.testing.assert_allclose(products(*later), products(phi, psi), atol=1e-6)
  moved = sf.spectral_attention(query, key[:, ::-1], value[:, ::-1], **kwargs)
  assert float(jnp.abs(moved - out)[:, -1].max()) > 1e-3


def test_cosformer_decodes_one_token_at_a_time():
  fm, variables = build_exact("cosformer", max_length=10)
  arrays = draw_inputs()
  kwargs = {"feature_map": fm, "variables": variables}
  whole = sf.spectral_attention(*arrays, is_causal=True, **kwargs)
  state = sf.init_state(batch_size=1, num_heads=2, head_dim=4, **kwargs)
  for t in range(7):
    token = (a[:, t : t + 1] for a in arrays)
    out, state = sf.decode_step(state, *token, **kwargs)
    np.testing.assert_allclose(out[:, 0], whole[:, t], atol=1e-5)


def test_cosformer_refuses_longer_sequences():
  fm, variables = build_exact("cosformer", max_length=6)
  query, key, value = draw_inputs()
  words = "max_length=6, got a sequence of length 7"
  with pytest.raises(ValueError, match=words):
    fm.apply(variables, query, side="query")
  with pytest.raises(ValueError, match=words):
    sf.spectral_attention(
      query[:, :3], key, value, feature_map=fm, variables=variables
    )


@pytest.mark.parametrize("learned", ["scalar", "per_dim", "none"])
def test_rfa_mean_and_square(learned):
  fm = build("rfa", learned=learned, sigma=0.9)
  move = None
  if learned != "none":
    # Widths of the coordinates: all equal, or all different.
    step = 0.3 if learned == "scalar" else jnp.array([[0.3, 0.0, -0.2, 0.1]])
    move = lambda v: v._replace(
      params=jax.tree.map(
        lambda leaf: leaf + jnp.broadcast_to(step, leaf.shape), v.params
      )
    )
  check_mean_and_square(fm, 20_000, change=move)
  if learned != "per_dim":
    sigma = 0.9 * np.exp(0.0 if move is None else 0.3)
    u, v = (
      PAIRS[:, side] / np.linalg.norm(PAIRS[:, side], axis=-1, keepdims=True)
      for side in (0, 1)
    )
    expected = np.exp(-(1 - np.sum(u * v, -1)) / sigma**2)
    state = first_head_state(fm, change=move)
    kernel = fm.component.kernel_value(PAIRS[:, 0], PAIRS[:, 1], state)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5)


@pytest.mark.parametrize("learned", ["scalar", "per_dim"])
@pytest.mark.slow
def test_rfa_trains_its_width_and_sees_directions_alone(learned):
  fm = build("rfa", num_features=64, learned=learned)
  variables = fm.init(jax.random.key(0), head_dim=4)
  x = jnp.asarray(PAIRS[:, :1])
  np.testing.assert_allclose(
    fm.apply(variables, 7.0 * x, side="key"),
    fm.apply(variables, x, side="key"),
    atol=1e-5,
  )
  grads = jax.grad(
    lambda params: jnp.sum(
      fm.apply(variables._replace(params=params), x, side="key")
    )
  )(variables.params)
  (leaf,) = jax.tree.leaves(grads)
  assert leaf.shape == ((1, 4) if learned == "per_dim" else (1,))
  assert float(jnp.abs(leaf).min()) > 0.0
  zero = lambda x: jnp.sum(fm.apply(variables, x, side="query") ** 3)
  assert bool(jnp.isfinite(jax.grad(zero)(jnp.zeros((1, 1, 4)))).all())


@pytest.mark.parametrize(
  ("name", "kwargs", "words"),
  [
    ("cosformer", {"max_length": 0}, "max_length must be a positive integer"),
    ("cosformer", {"epsilon": -1.0}, "epsilon must not be negative, got -1.0"),
    ("rfa", {"sigma": 0.0}, "sigma must be positive, got 0.0"),
    ("rfa", {"learned": "all"}, "learned must be one of"),
  ],
)
def test_errors(name, kwargs, words):
  with pytest.raises(ValueError, match=words):
    build(name, "iid" if name == "rfa" else "none", None, **kwargs)
