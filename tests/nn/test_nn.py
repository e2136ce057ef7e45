"""The Linen modules: shapes, padding, collections, redraw, baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf

# Fewer landmarks and shorter blocks than there are positions.
BASELINES = {
  "linformer": {"projected_length": 5},
  "local": {"block_size": 4, "neighbours": 1},
  "nystromformer": {"num_landmarks": 4},
  "skyformer": {"num_landmarks": 6},
}


OPTIONS = (
  {"positions": "rotary"},
  {"positions": "rotary", "pooling": "cls", "mlp": "gated", "norm": "post"},
  {"positions": "none", "pooling": "attention"},
  {"positions": "sinusoidal", "pooled_norm": "batch"},
)


def make_classifier(pair=("oprf", "orf"), component_kwargs=None, **kwargs):
  """A small classifier, its variables and a ragged batch."""
  fm = sf.feature_map(*pair, num_features=16, component_kwargs=component_kwargs)
  sizes = {"vocab_size": 16, "num_classes": 5, "max_len": 40, "head_dim": 8}
  kwargs = {"feature_map": fm, "embed_dim": 16, "mlp_dim": 32} | kwargs
  model = sf.nn.Classifier(**sizes, **kwargs)
  tokens = jax.random.randint(jax.random.key(0), (3, 20), 0, 16)
  length = jnp.array([20, 7, 1])
  rngs = {"params": jax.random.key(1), "features": jax.random.key(2)}
  return model, model.init(rngs, tokens, length), tokens, length


@pytest.mark.parametrize(
  "kwargs",
  [
    {},
    {"pair": ("trigrf", "iid")},
    {"pooling": "cls"},
    {"attention": "softmax", "feature_map": None},
    {"attention": "gaussian", "feature_map": None},
    {"attention": "matern", "feature_map": None},
    *(
      {"attention": name, "feature_map": None, "attention_kwargs": options}
      for name, options in BASELINES.items()
    ),
    {"attention": "linformer", "feature_map": None, "pooling": "cls"},
    {"component_kwargs": {"statistics": "ema"}},
    *OPTIONS,
  ],
)
@pytest.mark.quick_every(14)
def test_padding_changes_no_logit(kwargs):
  model, variables, tokens, length = make_classifier(**kwargs)
  logits = model.apply(variables, tokens, length)
  padded = jnp.pad(tokens, ((0, 0), (0, 17)), constant_values=9)
  longer = model.apply(variables, padded, length)
  np.testing.assert_allclose(longer, logits, atol=1e-6)
  other = jnp.where(jnp.arange(20)[None] < length[:, None], tokens, 3)
  np.testing.assert_allclose(
    model.apply(variables, other, length), logits, atol=1e-6
  )


@pytest.mark.parametrize(
  "kwargs",
  [
    {},
    {"pooling": "cls"},
    *(
      {"attention": name, "feature_map": None, "attention_kwargs": options}
      for name, options in BASELINES.items()
    ),
    *OPTIONS,
  ],
)
@pytest.mark.quick_every(9)
def test_batch_neighbours_change_no_logit(kwargs):
  model, variables, tokens, length = make_classifier(**kwargs)
  logits = model.apply(variables, tokens, length)
  alone = model.apply(variables, tokens[1:2], length[1:2])
  np.testing.assert_allclose(logits[1:2], alone, atol=1e-6)


def test_the_default_is_the_model_of_the_paper():
  fm = sf.feature_map("oprf", "orf", num_features=128)
  model = sf.nn.Classifier(
    vocab_size=32, num_classes=10, max_len=2048, feature_map=fm
  )
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 2048), int), jnp.array([2048])
    )
  )
  params = shapes["params"]
  assert params["token_embedding"]["embedding"].shape == (32, 64)
  assert params["position_embedding"].shape == (2048, 64)
  assert sorted(params["encoder"]) == ["layer_0", "layer_1", "norm"]
  layer = params["encoder"]["layer_0"]
  assert layer["attention"]["query"]["kernel"].shape == (64, 2, 32)
  assert layer["Dense_0"]["kernel"].shape == (64, 128)
  w = shapes["random_features"]["encoder"]["layer_0"]["attention"]["projection"]
  assert w["rows"]["w"].shape == (2, 128, 32)


def test_collections_and_redraw():
  model, variables, tokens, length = make_classifier()
  assert sorted(variables) == ["params", "random_features"]
  redraw = jax.jit(sf.nn.redraw, static_argnums=0)
  new = redraw(
    model.feature_map, jax.random.key(5), variables["random_features"]
  )
  old_leaves = jax.tree.leaves(variables["random_features"])
  new_leaves = jax.tree.leaves(new)
  assert len(new_leaves) == 2
  for old, drawn in zip(old_leaves, new_leaves, strict=True):
    assert old.shape == drawn.shape
    assert float(jnp.abs(old - drawn).max()) > 0.1
  assert float(jnp.abs(new_leaves[0] - new_leaves[1]).max()) > 0.1
  before = model.apply(variables, tokens, length)
  after = model.apply(variables | {"random_features": new}, tokens, length)
  assert before.shape == after.shape
  assert float(jnp.abs(before - after).max()) > 0.0


@pytest.mark.slow
def test_no_gradient_reaches_the_projection():
  model, variables, tokens, length = make_classifier()
  grads = jax.grad(lambda v: model.apply(v, tokens, length).sum())(variables)
  for grad in jax.tree.leaves(grads["random_features"]):
    np.testing.assert_array_equal(grad, 0.0)
  kernel = grads["params"]["encoder"]["layer_0"]["attention"]["query"]["kernel"]
  assert float(jnp.abs(kernel).max()) > 0.0


@pytest.mark.slow
def test_learnable_parameters_are_params():
  model, variables, tokens, length = make_classifier(
    component_kwargs={"statistics": "learned"}
  )
  layer = variables["params"]["encoder"]["layer_0"]["attention"]
  assert layer["feature_map"]["component"]["rho_logit"].shape == (2,)
  grads = jax.grad(
    lambda p: model.apply(variables | {"params": p}, tokens, length).sum()
  )(variables["params"])
  grad = grads["encoder"]["layer_0"]["attention"]["feature_map"]
  assert float(jnp.abs(grad["component"]["rho_logit"]).max()) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
  "kwargs",
  [{"component_kwargs": {"statistics": "ema"}}, {"pooled_norm": "batch"}],
)
def test_running_statistics_move_in_training_only(kwargs):
  model, variables, tokens, length = make_classifier(**kwargs)
  rngs = {"dropout": jax.random.key(3)}
  _, updated = model.apply(
    variables,
    tokens,
    length,
    deterministic=False,
    rngs=rngs,
    mutable=["feature_stats"],
  )
  _, frozen = model.apply(variables, tokens, length, mutable=["feature_stats"])
  old, new, still = map(
    jax.tree.leaves,
    (
      variables["feature_stats"],
      updated["feature_stats"],
      frozen["feature_stats"],
    ),
  )
  assert all(
    float(jnp.abs(a - b).max()) > 0 for a, b in zip(old, new, strict=True)
  )
  for before, after in zip(old, still, strict=True):
    np.testing.assert_array_equal(before, after)


def test_causal_layer_with_running_statistics_keeps_the_future_out():
  fm = sf.feature_map(
    "oprf", "orf", num_features=16, component_kwargs={"statistics": "ema"}
  )
  layer = sf.nn.SpectralSelfAttention(
    num_heads=2, head_dim=8, feature_map=fm, is_causal=True
  )
  x = jax.random.normal(jax.random.key(0), (2, 12, 16))
  variables = layer.init(jax.random.key(1), x)
  before = layer.apply(variables, x)
  after = layer.apply(variables, x.at[:, -1].add(5.0))
  np.testing.assert_allclose(after[:, :-1], before[:, :-1], atol=1e-5)


@pytest.mark.parametrize("component", ["oprf", "saderf"])
def test_queries_of_an_encoder_count_in_its_statistics(component):
  fm = sf.feature_map(component, "orf", num_features=16)
  layer = sf.nn.SpectralSelfAttention(num_heads=2, head_dim=8, feature_map=fm)
  x = jax.random.normal(jax.random.key(0), (2, 12, 16))
  mask = jnp.arange(12)[None] < jnp.array([[9], [12]])
  variables = layer.init(jax.random.key(1), x)
  params = variables["params"]
  query, key, value = (
    jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"])
    + params[name]["bias"][None, None]
    for name in ("query", "key", "value")
  )
  maps = sf.FeatureVariables({}, variables["random_features"]["projection"])
  masks = {"key_mask": mask, "query_mask": mask}
  stats = fm.calibrate(maps, query * 8**-0.25, key * 8**-0.25, **masks)
  heads = sf.spectral_attention(
    *(query, key, value),
    feature_map=fm,
    variables=maps,
    stats=stats,
    key_mask=mask,
  )
  expected = jnp.einsum("btnh,nhd->btd", heads, params["out"]["kernel"])
  out = layer.apply(variables, x, mask)
  real = np.asarray(mask)
  np.testing.assert_allclose(out[real], expected[real], atol=1e-5)


def test_parameters_of_a_baseline_are_for_the_longest_sequence():
  model, variables, *_ = make_classifier(
    attention="linformer",
    feature_map=None,
    attention_kwargs={"projected_length": 5},
  )
  layer = variables["params"]["encoder"]["layer_0"]["attention"]["baseline"]
  assert layer["key_projection"].shape == (2, 5, 40)


def test_local_attention_can_be_causal_and_linformer_cannot():
  make_layer = lambda name: sf.nn.SpectralSelfAttention(
    num_heads=2, head_dim=8, attention=name, is_causal=True
  )
  x = jax.random.normal(jax.random.key(0), (2, 12, 16))
  layer = make_layer("local")
  variables = layer.init(jax.random.key(1), x)
  before = layer.apply(variables, x)
  after = layer.apply(variables, x.at[:, -1].add(5.0))
  np.testing.assert_allclose(after[:, :-1], before[:, :-1], atol=1e-5)
  with pytest.raises(ValueError, match="'linformer' cannot be causal"):
    make_layer("linformer").init(jax.random.key(1), x)


def test_dropout_needs_its_key_and_is_off_in_evaluation():
  model, variables, tokens, length = make_classifier(dropout_rate=0.5)
  train = lambda seed: model.apply(
    variables,
    tokens,
    length,
    deterministic=False,
    rngs={"dropout": jax.random.key(seed)},
  )
  assert float(jnp.abs(train(0) - train(1)).max()) > 0.0
  np.testing.assert_array_equal(train(0), train(0))
  np.testing.assert_array_equal(
    model.apply(variables, tokens, length),
    model.apply(variables, tokens, length),
  )


@pytest.mark.parametrize(
  ("kwargs", "words"),
  [
    ({"attention": "spectrl"}, "Did you mean 'spectral'"),
    ({"feature_map": None}, "'spectral' needs a feature map"),
    ({"attention": "softmax"}, "exact kernels and baselines take none"),
    ({"attention": "local"}, "exact kernels and baselines take none"),
    (
      {
        "attention": "local",
        "feature_map": None,
        "attention_kwargs": {"blok_size": 4},
      },
      "Did you mean 'block_size'",
    ),
    ({"pooling": "meen"}, "Did you mean 'mean'"),
    ({"pooled_norm": "bach"}, "Did you mean 'batch'"),
    ({"positions": "rotery"}, "Did you mean 'rotary'"),
    ({"positions": "rotary", "head_dim": 7}, "even head_dim, got 7"),
    ({"mlp": "gatd"}, "Did you mean 'gated'"),
    ({"norm": "pst"}, "Did you mean 'post'"),
    ({"max_len": 10}, "longer than max_len=10"),
  ],
)
def test_errors(kwargs, words):
  fm = sf.feature_map("oprf", "orf", num_features=16)
  options = {"feature_map": fm, "max_len": 40} | kwargs
  model = sf.nn.Classifier(vocab_size=16, num_classes=5, **options)
  with pytest.raises(ValueError, match=words):
    model.init(jax.random.key(0), jnp.zeros((1, 20), int), jnp.array([20]))
