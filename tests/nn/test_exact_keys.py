"""Windows, sinks and heavy keys through the modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.nn.helpers import make_map, normal, with_larger_embeddings

VOCAB = 11
SIZES = {"vocab_size": VOCAB, "max_len": 16, "embed_dim": 8, "num_layers": 1}
SIZES |= {"head_dim": 4, "mlp_dim": 8}
TOKENS = jax.random.randint(jax.random.key(1), (3, 7), 0, VOCAB)
LENGTH = jnp.array([7, 1, 4])
LAYER = {"num_heads": 2, "head_dim": 4}


@functools.cache
def make_model(kind, **options):
  """A model whose outputs depend on its tokens, its variables and inputs."""
  if kind in (sf.nn.Classifier, sf.nn.DualClassifier):
    options["num_classes"] = 3
  model = kind(feature_map=make_map(), **SIZES, **options)
  inputs = {
    sf.nn.DualClassifier: (TOKENS, LENGTH, TOKENS[:, ::-1], LENGTH),
    sf.nn.Seq2Seq: (TOKENS, LENGTH, TOKENS[:, ::-1]),
  }.get(kind, (TOKENS, LENGTH))
  variables = jax.jit(model.init)(jax.random.key(0), *inputs)
  return model, with_larger_embeddings(variables), inputs


@pytest.mark.parametrize(
  ("kind", "exact", "options"),
  [
    (sf.nn.Classifier, {"window": 8}, {"pooling": "cls"}),
    (sf.nn.DualClassifier, {"num_heavy": 7}, {}),
    (sf.nn.LanguageModel, {"window": [7, 0]}, {"positions": "rotary"}),
    (sf.nn.MaskedLanguageModel, {"num_sinks": 7}, {}),
  ],
)
@pytest.mark.quick_every(2)
def test_all_keys_exact_is_softmax_attention(kind, exact, options):
  model, variables, inputs = make_model(kind, **options)
  apply = lambda **fields: jax.jit(model.clone(**fields).apply)(
    variables, *inputs
  )
  found, estimate = apply(**exact), apply()
  softmax = apply(attention="softmax", feature_map=None)
  if kind in (sf.nn.LanguageModel, sf.nn.MaskedLanguageModel):
    real = np.arange(7)[None] < LENGTH[:, None]
    found, softmax, estimate = found[real], softmax[real], estimate[real]
  np.testing.assert_allclose(found, softmax, atol=2e-5)
  assert np.abs(estimate - softmax).max() > 1e-3


def test_attention_to_a_memory_has_no_window():
  model, variables, inputs = make_model(sf.nn.Seq2Seq)
  apply = lambda **fields: jax.jit(model.clone(**fields).apply)(
    variables, *inputs
  )
  # All self-attention is exact, so only attention to the source is not.
  found = apply(window=7)
  softmax = apply(attention="softmax", feature_map=None)
  assert np.abs(found - softmax).max() > 1e-4
  with pytest.raises(TypeError, match="window"):
    sf.nn.SpectralCrossAttention(**LAYER, feature_map=make_map(), window=3)


def test_packed_rows_with_a_window_are_as_if_apart():
  model, variables, _ = make_model(
    sf.nn.LanguageModel, window=1, num_sinks=1, positions="rotary"
  )
  ids = jnp.array([[5, 5, 5, 2, 2, 2, 2]])
  apply = jax.jit(model.apply)
  packed = apply(variables, TOKENS[:1], segment_ids=ids)
  for start, stop in ((0, 3), (3, 7)):
    alone = apply(variables, TOKENS[:1, start:stop])
    np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-4)


def test_a_learnt_map_takes_gradients_beside_exact_keys():
  fm = sf.feature_map("posrf", "gmm", num_features=8)
  layer = sf.nn.SpectralSelfAttention(**LAYER, feature_map=fm, window=1)
  x = normal(0, 2, 9, 6)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  rest = {k: v for k, v in variables.items() if k != "params"}
  gradient = jax.jit(
    jax.grad(
      lambda params: jnp.sum(layer.apply({"params": params, **rest}, x) ** 2)
    )
  )(variables["params"])
  leaves = jax.tree.leaves(gradient["feature_map"])
  assert leaves and all(np.isfinite(leaf).all() for leaf in leaves)
  assert any(np.abs(leaf).max() > 0 for leaf in leaves)


@pytest.mark.parametrize(
  ("kind", "exact"),
  [
    (sf.nn.LanguageModel, {"window": 2, "num_sinks": 1}),
    (sf.nn.LanguageModel, {"num_sinks": 2}),
    (sf.nn.Seq2Seq, {"window": (3, 1)}),
  ],
)
@pytest.mark.quick_every(3)
def test_ragged_prompts_with_exact_keys_are_as_if_alone(kind, exact):
  model, variables, _ = make_model(kind, **exact)
  generate = functools.partial(sf.nn.generate, model, variables, num_tokens=7)
  source = lambda rows: (
    {"source": TOKENS[rows]} if kind is sf.nn.Seq2Seq else {}
  )
  real = jnp.arange(7)[None] < LENGTH[:, None]
  found = generate(
    jnp.where(real, TOKENS, 0), prompt_length=LENGTH, **source(slice(None))
  )
  for row in (1, 2):
    alone = generate(
      TOKENS[row : row + 1, : LENGTH[row]], **source(slice(row, row + 1))
    )
    np.testing.assert_array_equal(found[row], alone[0])


@functools.cache
def make_decoder():
  """A model, its variables, its logits and its decoding of more tokens."""
  model, variables, _ = make_model(
    sf.nn.LanguageModel, window=2, num_sinks=1, positions="rotary"
  )
  step = functools.partial(model.apply, decode=True, mutable=["cache"])
  return variables, jax.jit(model.apply), jax.jit(step)


@pytest.mark.parametrize("parts", [(3, 1, 1, 1, 1), (2, 5)])
@pytest.mark.quick_every(2)
def test_decoding_in_parts_is_one_pass(parts):
  variables, apply, step = make_decoder()
  whole = apply(variables, TOKENS)
  cache, start, shapes = {}, 0, []
  for part in parts:
    out, cache = step({**variables, **cache}, TOKENS[:, start : start + part])
    expected = whole[:, start : start + part]
    np.testing.assert_allclose(out, expected, atol=2e-4)
    shapes.append(jax.tree.map(jnp.shape, cache))
    start += part
  assert all(shape == shapes[0] for shape in shapes)


def test_the_rows_of_a_state_can_be_taken_in_another_order():
  variables, _, step = make_decoder()
  order = jnp.array([2, 0, 0])
  taken = lambda cache: jax.tree.map(lambda x: x[order] if x.ndim else x, cache)
  _, cache = step(variables, TOKENS[:, :3])
  found, _ = step({**variables, **taken(cache)}, TOKENS[order, 3:4])
  expected, _ = step({**variables, **cache}, TOKENS[:, 3:4])
  np.testing.assert_allclose(found, expected[order], atol=1e-5)


def test_rows_that_differ_in_each_part_continue_from_their_last_token():
  variables, apply, step = make_decoder()
  cache = {}
  seen = np.zeros((3, 9), int)
  ends = np.zeros(3, int)
  for lengths in ([3, 1, 0], [1, 3, 2], [0, 1, 3]):
    tokens, length = TOKENS[:, :3], jnp.array(lengths)
    out, cache = step({**variables, **cache}, tokens, length)
    for row, count in enumerate(lengths):
      seen[row, ends[row] : ends[row] + count] = tokens[row, :count]
    whole = apply(variables, jnp.asarray(seen))
    for row, count in enumerate(lengths):
      expected = whole[row, ends[row] : ends[row] + count]
      np.testing.assert_allclose(out[row, :count], expected, atol=2e-4)
    ends += lengths
  layer = cache["cache"]["encoder"]["layer_0"]["attention"]
  assert layer["state"].length == 9


def test_a_loop_carries_the_state_in_bfloat16():
  layer = sf.nn.SpectralSelfAttention(
    **LAYER,
    feature_map=make_map(),
    is_causal=True,
    window=2,
    num_sinks=1,
    dtype=jnp.bfloat16,
  )
  x = normal(0, 2, 5, 6).astype(jnp.bfloat16)
  init = jax.jit(functools.partial(layer.init, decode=True))
  variables = init(jax.random.key(0), x[:, :1])
  cache = {"cache": variables.pop("cache")}

  def step(cache, token):
    out, cache = layer.apply(
      {**variables, **cache}, token[:, None], decode=True, mutable=["cache"]
    )
    return cache, out[:, 0]

  _, out = jax.lax.scan(step, cache, jnp.swapaxes(x, 0, 1))
  whole = jax.jit(layer.apply)(variables, x)
  np.testing.assert_allclose(
    jnp.swapaxes(out, 0, 1).astype(jnp.float32),
    whole.astype(jnp.float32),
    atol=0.05,
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"attention": "softmax", "window": 3}, "^window=3 with attention='soft"),
    (
      {"attention": "local", "num_sinks": 1, "num_heavy": 2},
      "^num_sinks=1, num_heavy=2 with attention='local'",
    ),
    ({"feature_map": make_map("relu"), "window": 0}, "kernel of its own"),
    ({"feature_map": make_map(), "window": -1}, "window must be None"),
    ({"feature_map": make_map(), "num_sinks": 1.5}, "num_sinks must be an int"),
    (
      {"feature_map": make_map(), "num_heavy": 1, "is_causal": True},
      "num_heavy cannot be combined with is_causal=True",
    ),
  ],
)
def test_exact_keys_that_an_attention_cannot_have_are_refused(options, message):
  layer = sf.nn.SpectralSelfAttention(**LAYER, **options)
  with pytest.raises(ValueError, match=message):
    layer.init(jax.random.key(0), jnp.ones((1, 3, 8)))
