"""The classifier of pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf

SIZES = {
  "vocab_size": 16,
  "num_classes": 3,
  "max_len": 40,
  "num_layers": 1,
  "head_dim": 8,
}


def make_model(**kwargs):
  """A small model, its variables and a ragged batch of pairs."""
  fm = sf.feature_map("posrf", "iid", num_features=16)
  options = {"feature_map": fm, "embed_dim": 16, "mlp_dim": 32} | kwargs
  model = sf.nn.DualClassifier(**SIZES, **options)
  one = jax.random.randint(jax.random.key(0), (3, 20), 0, 16)
  two = jax.random.randint(jax.random.key(1), (3, 13), 0, 16)
  pair = (one, jnp.array([20, 7, 1]), two, jnp.array([2, 13, 9]))
  rngs = {"params": jax.random.key(1), "features": jax.random.key(2)}
  return model, jax.jit(model.init)(rngs, *pair), pair


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.quick_every(2)
def test_it_is_the_classifiers_encoder_and_an_mlp(pooling):
  model, variables, (one, length, two, length_2) = make_model(pooling=pooling)
  encoder = sf.nn.SequenceEncoder(
    vocab_size=16,
    max_len=40,
    num_layers=1,
    head_dim=8,
    feature_map=model.feature_map,
    embed_dim=16,
    mlp_dim=32,
    pooling=pooling,
  )
  params = dict(jax.tree.map(np.asarray, variables["params"]))
  hidden, logits = params.pop("head_hidden"), params.pop("head_logits")
  inner = variables | {"params": params}
  a = np.asarray(jax.jit(encoder.apply)(inner, one, length))
  b = np.asarray(jax.jit(encoder.apply)(inner, two, length_2))
  features = np.concatenate([a, b, a * b, a - b], axis=-1)
  x = np.maximum(features @ hidden["kernel"] + hidden["bias"], 0)
  expected = x @ logits["kernel"] + logits["bias"]
  np.testing.assert_allclose(
    jax.jit(model.apply)(variables, one, length, two, length_2),
    expected,
    atol=1e-5,
  )


def test_names_are_those_of_the_classifier():
  model, variables, (one, length, *_) = make_model()
  single = sf.nn.Classifier(
    **SIZES, feature_map=model.feature_map, embed_dim=16, mlp_dim=32
  )
  other = single.init(jax.random.key(0), one, length)
  assert sorted(variables) == sorted(other)
  shapes, wanted = (jax.tree.map(jnp.shape, v) for v in (variables, other))
  kernel = shapes["params"]["head_hidden"].pop("kernel")
  wanted["params"]["head_hidden"].pop("kernel")
  assert shapes == wanted and kernel == (64, 32)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.quick_every(2)
def test_padding_changes_no_logit(pooling):
  model, variables, (one, length, two, length_2) = make_model(pooling=pooling)
  logits = jax.jit(model.apply)(variables, one, length, two, length_2)
  pad = lambda rows, n: jnp.pad(rows, ((0, 0), (0, n)), constant_values=9)
  longer = jax.jit(model.apply)(
    variables, pad(one, 3), length, pad(two, 27), length_2
  )
  np.testing.assert_allclose(longer, logits, atol=1e-6)


def test_batch_neighbours_change_no_logit():
  model, variables, pair = make_model()
  logits = jax.jit(model.apply)(variables, *pair)
  alone = jax.jit(model.apply)(variables, *(array[1:2] for array in pair))
  np.testing.assert_allclose(alone, logits[1:2], atol=1e-6)


@pytest.mark.slow
def test_order_of_the_pair_matters_and_both_get_gradients():
  model, variables, (one, length, two, length_2) = make_model()
  logits = jax.jit(model.apply)(variables, one, length, two, length_2)
  swapped = jax.jit(model.apply)(variables, two, length_2, one, length)
  assert float(jnp.abs(logits - swapped).max()) > 1e-4

  def loss(params):
    out = model.apply(
      variables | {"params": params}, one, length, two, length_2
    )
    return (out**2).sum()

  grads = jax.jit(jax.grad(loss))(variables["params"])
  used = jnp.zeros(16).at[jnp.concatenate([one[0], two[0, :2]])].set(1.0)
  rows = jnp.abs(grads["token_embedding"]["embedding"]).max(axis=1)
  assert float((rows * used).max()) > 0
  positions = jnp.abs(grads["position_embedding"]).max(axis=1)
  assert (positions[:20] > 0).all() and not positions[20:].any()


@pytest.mark.slow
def test_running_statistics_and_dropout():
  fm = sf.feature_map(
    "oprf", "iid", num_features=16, component_kwargs={"statistics": "ema"}
  )
  model, variables, pair = make_model(feature_map=fm)
  _, updated = model.apply(
    variables,
    *pair,
    deterministic=False,
    rngs={"dropout": jax.random.key(3)},
    mutable=["feature_stats"],
  )
  old, new = map(
    jax.tree.leaves, (variables["feature_stats"], updated["feature_stats"])
  )
  assert all(
    float(jnp.abs(a - b).max()) > 0 for a, b in zip(old, new, strict=True)
  )


@pytest.mark.parametrize("which", [0, 2])
def test_too_long(which):
  model, variables, pair = make_model()
  pair = list(pair)
  pair[which] = jnp.zeros((3, 41), int)
  with pytest.raises(ValueError, match="is longer than max_len=40"):
    jax.jit(model.apply)(variables, *pair)
