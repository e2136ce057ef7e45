"""Flax's attention modules and jax.nn's signature, on random features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spectraformer_jax as sf
from tests.adapters.helpers import (
  BATCH,
  CAUSAL,
  HEAD_DIM,
  HEADS,
  LENGTH,
  LENGTHS,
  MASKS,
  PADDING,
  REAL,
  WIDTH,
  make_map,
  masked_attention,
  random_inputs,
)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("component", ["posrf", "oprf"])
@pytest.mark.quick_every(4)
def test_masks_of_flax(name, jit, component):
  mask, is_causal = MASKS[name]
  fm, variables = make_map(component)
  q, k, v = random_inputs()
  stats = None
  if component == "oprf":
    scaled = (x * HEAD_DIM**-0.25 for x in (q, k))
    stats = fm.calibrate(variables, *scaled)
  fn = sf.as_attention_fn(fm, variables, stats=stats, is_causal=is_causal)
  call = lambda mask: fn(q, k, v, mask=mask)
  out = (jax.jit(call) if jit else call)(mask)
  expected = masked_attention(q, k, v, mask, fm, variables, stats)
  np.testing.assert_allclose(out, expected, atol=2e-6)


BAND = jnp.abs(jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)) < 2


@pytest.mark.parametrize("is_causal", [False, True])
def test_other_masks_are_refused(is_causal):
  fm, variables = make_map()
  fn = sf.as_attention_fn(fm, variables, is_causal=is_causal)
  q, k, v = random_inputs()
  mask = BAND[None, None]
  with pytest.raises(ValueError, match="is_causal=True for a causal mask"):
    fn(q, k, v, mask=mask)
  # Known at trace time as well, from numpy or from outside.
  for known in (mask, np.asarray(mask)):
    with pytest.raises(ValueError, match="is_causal=True for a causal mask"):
      jax.jit(lambda q, known=known: fn(q, k, v, mask=known))(q)
  # Inside jit a mask is not known: outputs and gradients say it, example by
  # example.
  mixed = jnp.concatenate([jnp.ones((2, *mask.shape[1:]), bool), mask])
  mixed = mixed & (CAUSAL[:1] > 0) if is_causal else mixed

  def call(mask, *qkv):
    out = fn(*qkv, mask=mask)
    return jnp.sum(jnp.sin(out[2:])) + jnp.sum(out[:2]), out

  grads, out = jax.jit(jax.grad(call, (1, 2, 3), has_aux=True))(mixed, q, k, v)
  assert np.isnan(out[2]).all()
  for leaf in (out, *grads):
    bad = np.isnan(leaf).any(axis=(1, 2, 3))
    assert bad.tolist() == [False, False, True]
    assert not np.isnan(leaf[:2]).any()


def test_debug_nans_turns_an_unknown_mask_into_the_sentence():
  fm, variables = make_map()
  fn = sf.as_attention_fn(fm, variables)
  call = jax.jit(lambda mask: fn(*random_inputs(), mask=mask))
  with (
    jax.debug_nans(True),
    pytest.raises(ValueError, match="cannot honour another mask"),
  ):
    call(BAND[None, None])


def test_heads_that_see_different_keys_are_refused():
  fm, variables = make_map()
  mask = jnp.ones((1, HEADS, 1, LENGTH), bool).at[0, 1, 0, 0].set(False)
  with pytest.raises(ValueError, match="which queries and which keys"):
    sf.as_attention_fn(fm, variables)(*random_inputs(), mask=mask)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"bias": jnp.ones((1, 1, 7, 7))}, "bias"),
    ({"dropout_rate": 0.1}, "dropout_rate=0.1"),
    ({"module": object()}, "sow_weights"),
    ({"mask": jnp.ones((1, 1, 7, 5), bool)}, r"\[3, 2, 7, 7\].*mask.shape"),
  ],
)
def test_what_cannot_be_honoured_is_an_error(kwargs, message):
  fm, variables = make_map()
  with pytest.raises(ValueError, match=message):
    sf.as_attention_fn(fm, variables)(*random_inputs(), **kwargs)


@pytest.mark.parametrize("name", MASKS)
def test_inside_a_linen_module(name):
  mask, is_causal = MASKS[name]
  fm, variables = make_map()
  layer = nn.MultiHeadDotProductAttention(
    num_heads=HEADS,
    attention_fn=sf.as_attention_fn(fm, variables, is_causal=is_causal),
  )
  x = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))
  params = layer.init(jax.random.key(3), x)
  out = jax.jit(layer.apply)(params, x, mask=mask)
  hidden = jnp.where(REAL[:, :, None], x, 5.0)
  again = layer.apply(params, hidden, mask=mask)
  assert out.shape == x.shape
  if "padding" in name:
    real = np.asarray(REAL)
    np.testing.assert_allclose(out[real], again[real], atol=1e-5)
  if is_causal:
    later = layer.apply(params, x.at[:, 4:].set(9.0), mask=mask)
    np.testing.assert_array_equal(
      later[:, :4], layer.apply(params, x, mask=mask)[:, :4]
    )


@pytest.mark.parametrize("name", MASKS)
def test_inside_an_nnx_module(name):
  mask, is_causal = MASKS[name]
  fm, variables = make_map()
  layer = nnx.MultiHeadAttention(
    num_heads=HEADS,
    in_features=WIDTH,
    decode=False,
    attention_fn=sf.as_attention_fn(fm, variables),
    rngs=nnx.Rngs(0),
  )
  x = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))
  out = nnx.jit(lambda m, x: m(x, mask=mask, is_causal=is_causal))(layer, x)
  q, k, v = layer.query(x), layer.key(x), layer.value(x)
  expected = layer.out(masked_attention(q, k, v, mask, fm, variables, None))
  np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_decoding_in_a_linen_module_equals_one_causal_pass(is_causal):
  fm, variables = make_map()
  x = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))
  make = lambda is_causal, **kwargs: nn.MultiHeadDotProductAttention(
    num_heads=HEADS,
    attention_fn=sf.as_attention_fn(fm, variables, is_causal=is_causal),
    **kwargs,
  )
  layer = make(is_causal, decode=True)
  state = layer.init(jax.random.key(3), x)
  whole = make(True).apply({"params": state["params"]}, x)
  for position in range(LENGTH):
    out, new = layer.apply(
      state, x[:, position : position + 1], mutable=["cache"]
    )
    state = state | new
    np.testing.assert_allclose(out[:, 0], whole[:, position], atol=1e-5)


def test_linen_layers_in_an_nnx_model():
  fm, _ = make_map("oprf")
  layer = nnx.bridge.ToNNX(
    sf.nn.SpectralSelfAttention(
      num_heads=HEADS, head_dim=HEAD_DIM, feature_map=fm
    ),
    rngs=nnx.Rngs(params=0, features=1),
  )
  x = jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))
  layer.lazy_init(x)
  assert layer(x).shape == x.shape
  grads = nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)
  assert all(
    np.abs(g).max() > 0
    for g in jax.tree.leaves(nnx.to_pure_dict(grads)["query"])
  )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(2)
def test_jax_nn_signature(is_causal):
  fm, variables = make_map()
  attention = sf.as_dot_product_attention(fm, variables)
  q, k, v = random_inputs()
  kwargs = {"query_seq_lengths": LENGTHS, "key_value_seq_lengths": LENGTHS}
  out = attention(q, k, v, is_causal=is_causal, **kwargs)
  mask = PADDING.astype(bool)
  if is_causal:
    mask = mask & (CAUSAL > 0)
  expected = masked_attention(q, k, v, mask, fm, variables, None)
  np.testing.assert_allclose(out, expected, atol=2e-6)
  same = attention(q, k, v, mask=mask, is_causal=is_causal)
  np.testing.assert_allclose(same, expected, atol=2e-6)
  alone = attention(q[0], k[0], v[0], is_causal=is_causal)
  np.testing.assert_allclose(alone, out[0], atol=2e-6)


@pytest.mark.parametrize(
  "kwargs",
  [
    {"bias": jnp.ones((1, 1, 7, 7))},
    {"local_window_size": 2},
    {"return_residual": True},
    {"implementation": "cudnn"},
  ],
)
def test_jax_nn_options_that_cannot_be_honoured(kwargs):
  fm, variables = make_map()
  with pytest.raises(ValueError, match=next(iter(kwargs))):
    sf.as_dot_product_attention(fm, variables)(*random_inputs(), **kwargs)
