"""What padding holds reaches no gradient; tokens that are none are loud."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.nn.helpers import make_map

VOCAB = 11
SIZES = {"num_layers": 1, "embed_dim": 8, "head_dim": 4, "mlp_dim": 8}
REAL = jnp.array([[True] * 6, [True] * 2 + [False] * 4])
LENGTH = jnp.array([6, 2])


LAYERS = {
  "posrf": {"feature_map": make_map()},
  "oprf": {"feature_map": make_map("oprf")},
  "trigrf causal": {"feature_map": make_map("trigrf"), "is_causal": True},
  "ema": {"feature_map": make_map("oprf", statistics="ema")},
  "learned": {"feature_map": make_map("oprf", statistics="learned")},
  "softmax": {"attention": "softmax"},
  "gaussian": {"attention": "gaussian", "is_causal": True},
  "linformer": {
    "attention": "linformer",
    "attention_kwargs": {"projected_length": 3},
  },
  "local": {"attention": "local", "attention_kwargs": {"block_size": 4}},
  "nystromformer": {
    "attention": "nystromformer",
    "attention_kwargs": {"num_landmarks": 2},
  },
  "skyformer": {
    "attention": "skyformer",
    "attention_kwargs": {"num_landmarks": 2},
  },
}


def assert_same(found, expected, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected
  )


@pytest.mark.parametrize("kind", ["layer", "encoder"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.quick_every(11)
def test_padding_of_vectors_reaches_no_gradient(name, kind):
  if kind == "layer":
    module = sf.nn.SpectralSelfAttention(
      num_heads=2, head_dim=4, **LAYERS[name]
    )
  else:
    sizes = {k: v for k, v in SIZES.items() if k != "embed_dim"}
    module = sf.nn.Encoder(**sizes, **LAYERS[name])
  x = jax.random.normal(jax.random.key(0), (2, 6, 8))
  variables = module.init(jax.random.key(1), x, REAL)

  @jax.jit
  def value_and_grads(params, x):
    def loss(params, x):
      out, _ = module.apply(
        {**variables, "params": params},
        x,
        REAL,
        deterministic=False,
        rngs={"dropout": jax.random.key(2)},
        mutable=["feature_stats"],
      )
      return jnp.sum(jnp.where(REAL[:, :, None], jnp.sin(3 * out), 0))

    return jax.value_and_grad(loss, (0, 1))(params, x)

  hold = lambda filler: jnp.where(REAL[:, :, None], x, filler)
  expected = value_and_grads(variables["params"], hold(0.0))
  assert np.abs(expected[1][1][1, :2]).max() > 0
  np.testing.assert_array_equal(expected[1][1][1, 2:], 0.0)
  for filler in (jnp.nan, -jnp.inf, 1e30):
    found = value_and_grads(variables["params"], hold(filler))
    assert_same(found, expected, rtol=0, atol=0)


def make_model(name):
  """A model of tokens and its arguments, of padding that holds token 0."""
  tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, VOCAB)
  tokens = jnp.where(REAL, tokens, 0)
  options = {"vocab_size": VOCAB, "max_len": 8, **SIZES}
  maps = {"feature_map": make_map("oprf", statistics="constant")}
  if name == "softmax":
    maps = {"attention": "softmax"}
  if name == "language":
    return sf.nn.LanguageModel(**options, **maps), (tokens, LENGTH)
  if name == "masked":
    return sf.nn.MaskedLanguageModel(**options, **maps), (tokens, LENGTH)
  options = {**options, **maps, "num_classes": 3}
  if name == "dual":
    pair = (tokens, LENGTH, tokens[::-1], LENGTH[::-1])
    return sf.nn.DualClassifier(**options), pair
  pooling = name if name in ("cls", "attention") else "mean"
  return sf.nn.Classifier(pooling=pooling, **options), (tokens, LENGTH)


MODELS = ("mean", "language", "dual", "cls", "attention", "softmax", "masked")


@functools.cache
def init_model(name):
  model, inputs = make_model(name)
  return model, jax.jit(model.init)(jax.random.key(1), *inputs), inputs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.quick_every(4)
def test_padding_tokens_may_be_no_tokens(name):
  model, variables, inputs = init_model(name)

  @jax.jit
  def value_and_grad(params, *inputs):
    def loss(params):
      out = model.apply({**variables, "params": params}, *inputs)
      out = jnp.sin(3 * out)
      return jnp.sum(
        jnp.where(REAL[:, :, None], out, 0) if out.ndim > 2 else out
      )

    return jax.value_and_grad(loss)(params)

  expected = value_and_grad(variables["params"], *inputs)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
  for filler in (VOCAB - 1, VOCAB, -1, -(2**31), 2**31 - 1):
    padded = list(inputs)
    for i in range(0, len(inputs), 2):
      real = jnp.arange(6)[None] < inputs[i + 1][:, None]
      padded[i] = jnp.where(real, inputs[i], filler)
    found = value_and_grad(variables["params"], *padded)
    assert_same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [VOCAB, -1, -VOCAB - 1, 300])
def test_real_tokens_out_of_the_vocabulary_are_loud(wrong):
  model, variables, (tokens, length) = init_model("mean")
  tokens = tokens.at[1, 0].set(wrong)
  words = rf"tokens must be in \[0, vocab_size=11\), got {wrong}"
  for known in (tokens, np.asarray(tokens), tokens.tolist()):
    with pytest.raises(ValueError, match=words):
      model.apply(variables, known, length)
  logits = jax.jit(model.apply)(variables, tokens, length)
  assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


def test_tokens_of_64_bits_do_not_wrap():
  model, variables, (tokens, length) = init_model("mean")
  tokens = np.asarray(tokens, np.int64)
  tokens[0, 0] += 1 << 32
  with pytest.raises(ValueError, match=f"got {tokens[0, 0]}"):
    model.apply(variables, tokens, length)


def test_tokens_of_pairs_are_checked_one_by_one():
  model, variables, (tokens, length, *pair) = init_model("dual")
  wide = np.asarray(tokens, np.int64)
  wide[0, 0] += 1 << 32
  with pytest.raises(ValueError, match=f"tokens must be .*got {wide[0, 0]}"):
    model.apply(variables, wide, length, *pair)
  with pytest.raises(ValueError, match="tokens_2 must be in .*got 11"):
    wrong = pair[0].at[0, 0].set(VOCAB)
    model.apply(variables, tokens, length, wrong, pair[1])


def test_lists_are_taken():
  model, variables, (tokens, length) = init_model("mean")
  np.testing.assert_array_equal(
    model.apply(variables, tokens.tolist(), length.tolist()),
    model.apply(variables, tokens, length),
  )
  tokens = tokens.astype(jnp.uint8)
  assert np.isfinite(jax.jit(model.apply)(variables, tokens, length)).all()


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda t, n: (t[0], n), r"tokens must be ints \[batch, length\], got int"),
    (lambda t, n: (t * 1.0, n), r"tokens must be ints .*, got float32"),
    (lambda t, n: (t, 3), r"length must be ints \[batch\] = \[2\]"),
    (lambda t, n: (t, n[:, None]), r"length must be ints .*shape \(2, 1\)"),
    (lambda t, n: (t, n[:1]), r"length must be ints .*shape \(1,\)"),
    (lambda t, n: (t, n * 1.0), "length must be ints .*got float32"),
  ],
)
def test_arguments_of_other_forms_are_refused(change, words):
  for name in ("mean", "language"):
    model, variables, inputs = init_model(name)
    with pytest.raises(ValueError, match=words):
      model.apply(variables, *change(*inputs))


def test_pairs_need_batches_of_one_size():
  model, variables, (tokens, length, *_) = init_model("dual")
  three = jnp.concatenate([tokens, tokens[:1]]), jnp.array([6, 2, 3])
  one = tokens[:1], length[:1]
  for pair in ((*three, *one), (*one, *three)):
    with pytest.raises(ValueError, match="must share batch"):
      model.apply(variables, *pair)


def test_mask_and_vectors_are_checked():
  layer = sf.nn.SpectralSelfAttention(
    num_heads=2, head_dim=4, feature_map=make_map()
  )
  x = jnp.ones((2, 6, 8))
  variables = layer.init(jax.random.key(0), x)
  np.testing.assert_array_equal(
    layer.apply(variables, x, REAL.tolist()), layer.apply(variables, x, REAL)
  )
  with pytest.raises(ValueError, match=r"x must be \[batch, length, width\]"):
    layer.apply(variables, x[0])
  with pytest.raises(ValueError, match=r"mask must be \[batch, length\]"):
    layer.apply(variables, x, REAL[:, :3])
  with pytest.raises(ValueError, match="mask must be boolean"):
    layer.apply(variables, x, REAL.astype(jnp.float32))


@pytest.mark.parametrize("name", ["mean", "softmax"])
def test_empty_inputs(name):
  model, variables, (tokens, length) = init_model(name)
  apply = jax.jit(model.apply)
  assert apply(variables, tokens[:0], length[:0]).shape == (0, 3)
  assert np.isfinite(apply(variables, tokens[:, :0], 0 * length)).all()
