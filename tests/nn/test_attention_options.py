"""Packed rows, grouped queries and dtypes of parameters, through modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.nn.positions import positions_in_segments
from tests.nn.helpers import make_map, with_larger_embeddings

SIZES = {"num_layers": 1, "head_dim": 4, "mlp_dim": 8}
SEGMENTS = jnp.array([[5, 5, 5, 2, 2, 9, 9, 9], [1, 1, 1, 1, 1, 1, 4, 4]])


def make_language_model(kind=sf.nn.LanguageModel, shapes=False, **kwargs):
  """A model, its variables or their shapes, and tokens."""
  options = {"feature_map": make_map()} | kwargs
  model = kind(vocab_size=11, max_len=8, embed_dim=8, **SIZES, **options)
  tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 11)
  if shapes:
    variables = jax.eval_shape(model.init, jax.random.key(1), tokens)
    return model, variables, tokens
  variables = jax.jit(model.init)(jax.random.key(1), tokens)
  return model, with_larger_embeddings(variables), tokens


@pytest.mark.parametrize(
  "kwargs",
  [
    {"positions": "rotary"},
    {"kind": sf.nn.MaskedLanguageModel},
    {"attention": "softmax", "feature_map": None, "positions": "rotary"},
    {"feature_map": make_map("oprf", statistics="ema")},
    {"num_key_value_heads": 1, "positions": "learned"},
  ],
)
@pytest.mark.quick_every(5)
def test_packed_rows_are_as_if_apart(kwargs):
  model, variables, tokens = make_language_model(**kwargs)
  apply = jax.jit(model.apply)
  packed = apply(variables, tokens, segment_ids=SEGMENTS)
  # In any order: what is interleaved is attended as if it were not.
  order = jnp.array([3, 0, 5, 1, 6, 4, 7, 2])
  mixed = apply(variables, tokens[:, order], segment_ids=SEGMENTS[:, order])
  np.testing.assert_allclose(mixed[0], packed[0, order], atol=1e-5)
  for row, start, stop in (
    (0, 0, 3),
    (0, 3, 5),
    (0, 5, 8),
    (1, 0, 6),
    (1, 6, 8),
  ):
    alone = apply(variables, tokens[row : row + 1, start:stop])
    np.testing.assert_allclose(packed[row, start:stop], alone[0], atol=1e-5)
  assert np.abs(packed - apply(variables, tokens)).max() > 1e-3


def test_positions_start_again_in_each_segment():
  found = positions_in_segments(SEGMENTS)
  expected = [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]]
  np.testing.assert_array_equal(found, expected)
  assert positions_in_segments(SEGMENTS[:, :0]).shape == (2, 0)


@pytest.mark.parametrize(
  ("kwargs", "words"),
  [
    ({"feature_map": make_map("oprf")}, "mix segments"),
    (
      {"attention": "local", "feature_map": None},
      "segment_ids with attention='local'",
    ),
  ],
)
def test_packed_rows_are_refused_in_words(kwargs, words):
  encoder = sf.nn.Encoder(**SIZES, **kwargs)
  x = jnp.ones((2, 8, 8))
  with pytest.raises(ValueError, match=words):
    encoder.init(jax.random.key(0), x, segment_ids=SEGMENTS)


def test_segment_ids_of_another_form_are_refused():
  model, variables, tokens = make_language_model(shapes=True)
  apply = functools.partial(jax.eval_shape, model.apply, variables, tokens)
  assert apply(segment_ids=SEGMENTS).shape == (2, 8, 11)
  for wrong in (SEGMENTS[:, :5], SEGMENTS * 1.0):
    with pytest.raises(ValueError, match="segment_ids must be ints"):
      apply(segment_ids=wrong)
  with pytest.raises(ValueError, match="decode=True with segment_ids"):
    jax.eval_shape(
      functools.partial(model.apply, decode=True, mutable=["cache"]),
      variables,
      tokens,
      segment_ids=SEGMENTS,
    )
  encoder = sf.nn.TokenEncoder(
    vocab_size=11,
    max_len=8,
    prepend_cls=True,
    feature_map=make_map(),
    **SIZES,
  )
  with pytest.raises(ValueError, match="segment_ids with prepend_cls"):
    encoder.init(jax.random.key(0), tokens, None, segment_ids=SEGMENTS)


@pytest.mark.parametrize(
  "kwargs",
  [
    {"feature_map": make_map()},
    {"attention": "softmax"},
    {"feature_map": make_map("oprf", statistics="ema"), "rotary": True},
    {"feature_map": make_map("oprf"), "share_projection": True},
  ],
)
@pytest.mark.quick_every(4)
def test_grouped_queries_are_repeated_keys(kwargs):
  sizes = {"num_heads": 4, "head_dim": 4, **kwargs}
  grouped = sf.nn.SpectralSelfAttention(num_key_value_heads=2, **sizes)
  x = jax.random.normal(jax.random.key(0), (2, 6, 8))
  variables = jax.jit(grouped.init)(jax.random.key(1), x)
  assert variables["params"]["key"]["kernel"].shape == (8, 2, 4)
  assert variables["params"]["query"]["kernel"].shape == (8, 4, 4)

  out, updated = grouped.apply(
    variables, x, deterministic=False, mutable=["feature_stats"]
  )
  if "feature_stats" in variables:
    moments = jax.tree.leaves(updated["feature_stats"])
    assert all(leaf.shape[:2] == (1, 2) for leaf in moments)
  if kwargs.get("share_projection") and kwargs["feature_map"].info.needs_stats:
    return  # statistics of two groups are not those of four heads
  twice = lambda leaf, axis: jnp.repeat(leaf, 2, axis=axis)
  params = dict(variables["params"])
  for name in ("key", "value"):
    params[name] = jax.tree.map(lambda x: twice(x, -2), params[name])
  repeated = {**variables, "params": params}
  for name in {"random_features", "feature_stats"} & repeated.keys():
    axis = 0 if name == "random_features" else 1
    repeated[name] = jax.tree.map(lambda x, a=axis: twice(x, a), repeated[name])
  every = sf.nn.SpectralSelfAttention(**sizes)
  np.testing.assert_allclose(every.apply(repeated, x), out, atol=1e-5)


def test_grouped_queries_decode():
  model, variables, tokens = make_language_model(
    num_heads=4, num_key_value_heads=2, positions="rotary"
  )
  whole = jax.jit(model.apply)(variables, tokens)
  read = jax.jit(functools.partial(model.apply, decode=True, mutable=["cache"]))
  cache, parts = {}, []
  for start, stop in ((0, 5), (5, 6), (6, 8)):
    out, cache = read({**variables, **cache}, tokens[:, start:stop])
    parts.append(out)
  assert cache["cache"]["encoder"]["layer_0"]["attention"]["state"].kv.shape[
    :2
  ] == (2, 2)
  np.testing.assert_allclose(
    jnp.concatenate(parts, axis=1), whole, atol=1e-5, rtol=1e-4
  )


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_heads_that_do_not_divide_are_refused(heads):
  with pytest.raises(ValueError, match=f"num_key_value_heads={heads} must"):
    make_language_model(num_heads=4, num_key_value_heads=heads)


def test_parameters_have_their_dtype_and_results_do_not_change():
  kinds = {
    "language": {"positions": "sinusoidal", "mlp": "gated"},
    "masked": {"kind": sf.nn.MaskedLanguageModel, "norm": "post"},
  }
  for kwargs in kinds.values():
    model, variables, tokens = make_language_model(
      param_dtype=jnp.bfloat16, shapes=True, **kwargs
    )
    for leaf in jax.tree.leaves(variables["params"]):
      assert leaf.dtype == jnp.bfloat16
    out = jax.eval_shape(model.apply, variables, tokens)
    assert out.dtype == jnp.float32
  model = sf.nn.Classifier(
    vocab_size=11,
    num_classes=3,
    max_len=8,
    embed_dim=8,
    pooling="cls",
    param_dtype=jnp.bfloat16,
    feature_map=make_map("oprf", statistics="learned"),
    **SIZES,
  )
  inputs = tokens, jnp.array([8, 3])
  variables = jax.jit(model.init)(jax.random.key(0), *inputs)
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
    in_map = "feature_map" in jax.tree_util.keystr(path)
    assert leaf.dtype == (jnp.float32 if in_map else jnp.bfloat16)
  logits = jax.jit(model.apply)(variables, *inputs)
  assert logits.dtype == jnp.float32 and np.isfinite(logits).all()


# Of a model before these options: checkpoints of then load today.
NAMES = {
  "encoder/layer_0/Dense_0/bias": (8,),
  "encoder/layer_0/Dense_0/kernel": (6, 8),
  "encoder/layer_0/Dense_1/bias": (6,),
  "encoder/layer_0/Dense_1/kernel": (8, 6),
  "encoder/layer_0/LayerNorm_0/bias": (6,),
  "encoder/layer_0/LayerNorm_0/scale": (6,),
  "encoder/layer_0/LayerNorm_1/bias": (6,),
  "encoder/layer_0/LayerNorm_1/scale": (6,),
  "encoder/layer_0/attention/key/bias": (2, 4),
  "encoder/layer_0/attention/key/kernel": (6, 2, 4),
  "encoder/layer_0/attention/out/bias": (6,),
  "encoder/layer_0/attention/out/kernel": (2, 4, 6),
  "encoder/layer_0/attention/query/bias": (2, 4),
  "encoder/layer_0/attention/query/kernel": (6, 2, 4),
  "encoder/layer_0/attention/value/bias": (2, 4),
  "encoder/layer_0/attention/value/kernel": (6, 2, 4),
  "encoder/layer_0/gate/bias": (8,),
  "encoder/layer_0/gate/kernel": (6, 8),
  "encoder/norm/bias": (6,),
  "encoder/norm/scale": (6,),
  "position_embedding": (8, 6),
  "token_embedding/embedding": (11, 6),
}
HEADS = {
  "classifier": {
    "cls_token": (1, 1, 6),
    "head_hidden/bias": (8,),
    "head_hidden/kernel": (6, 8),
    "head_logits/bias": (3,),
    "head_logits/kernel": (8, 3),
  },
  "language": {"logits/bias": (11,), "logits/kernel": (6, 11)},
}


@pytest.mark.parametrize("kind", HEADS)
def test_names_and_shapes_of_parameters_stay(kind):
  options = {"vocab_size": 11, "max_len": 8, "embed_dim": 6, "mlp": "gated"}
  options |= {"feature_map": make_map(), **SIZES}
  inputs = jnp.ones((1, 4), int), jnp.array([4])
  if kind == "classifier":
    model = sf.nn.Classifier(num_classes=3, pooling="cls", **options)
  else:
    model = sf.nn.LanguageModel(**options)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  assert sorted(shapes) == ["params", "random_features"]
  by_name = lambda tree: {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  assert by_name(shapes["params"]) == NAMES | HEADS[kind]
  assert by_name(shapes["random_features"]) == {
    "encoder/layer_0/attention/projection/rows/w": (2, 8, 4)
  }
