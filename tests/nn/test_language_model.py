"""Language models: causality, decoding with state, generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.nn.helpers import with_larger_embeddings

VOCAB = 11
COMPONENTS = {
  "posrf": None,
  "oprf": {"statistics": "ema"},
  "trigrf": None,
  "cosformer": {"max_length": 32},
  "relu": None,
}


def make_model(component="posrf", kind=sf.nn.LanguageModel, **kwargs):
  """A model whose logits depend on their input, and its variables."""
  matrix, rows = ("none", None) if component == "cosformer" else ("orf", 16)
  fm = sf.feature_map(
    component, matrix, num_features=rows, component_kwargs=COMPONENTS[component]
  )
  sizes = {"embed_dim": 16, "head_dim": 8, "mlp_dim": 32, "max_len": 32}
  kwargs = {"feature_map": fm} | sizes | kwargs
  model = kind(vocab_size=VOCAB, **kwargs)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 4), int))
  return model, with_larger_embeddings(variables)


def tokens(length=12):
  return jax.random.randint(jax.random.key(1), (2, length), 0, VOCAB)


OPTIONS = (
  *((component, "learned") for component in COMPONENTS),
  ("posrf", "rotary"),
)


@pytest.mark.parametrize(("component", "positions"), OPTIONS)
@pytest.mark.quick_every(6)
def test_the_future_changes_nothing_before_it(component, positions):
  model, variables = make_model(component, positions=positions)
  apply = jax.jit(model.apply)
  logits = apply(variables, tokens())
  changed = apply(variables, tokens().at[:, 7:].add(1) % VOCAB)
  np.testing.assert_array_equal(logits[:, :7], changed[:, :7])
  assert np.abs(logits[:, 7:] - changed[:, 7:]).max() > 1e-3


@pytest.mark.parametrize(("component", "positions"), OPTIONS)
@pytest.mark.quick_every(6)
def test_decoding_in_pieces_equals_one_pass(component, positions):
  model, variables = make_model(component, positions=positions)
  whole = model.apply(variables, tokens())
  cache, parts = {}, []
  for start, stop in [(0, 5), (5, 6), (6, 7), (7, 12)]:
    out, cache = model.apply(
      {**variables, **cache},
      tokens()[:, start:stop],
      decode=True,
      mutable=["cache"],
    )
    parts.append(out)
  np.testing.assert_allclose(
    jnp.concatenate(parts, axis=1), whole, atol=1e-5, rtol=1e-4
  )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("component", ["posrf", "oprf"])
@pytest.mark.slow
def test_generation_with_state_equals_recomputation(component, temperature):
  model, variables = make_model(component)
  rng = jax.random.key(4)
  new = sf.nn.generate(
    model,
    variables,
    tokens(3),
    num_tokens=9,
    rng=rng,
    temperature=temperature,
  )
  assert new.shape == (2, 9)
  text = tokens(3)
  for step_rng in jax.random.split(rng, 9):
    logits = model.apply(variables, text)[:, -1]
    if temperature:
      token = jax.random.categorical(step_rng, logits / temperature)
    else:
      token = jnp.argmax(logits, axis=-1)
    text = jnp.concatenate([text, token[:, None]], axis=1)
  np.testing.assert_array_equal(new, text[:, 3:])
  assert len(np.unique(new)) > 1


@pytest.mark.slow
def test_the_cache_does_not_grow():
  model, variables = make_model()
  sizes = []
  for length in (1, 20):
    _, cache = model.apply(
      variables, tokens(length), decode=True, mutable=["cache"]
    )
    sizes.append([x.shape for x in jax.tree.leaves(cache)])
  assert sizes[0] == sizes[1]


def test_beyond_max_len_is_nan_and_not_another_position():
  model, variables = make_model()
  out, cache = model.apply(
    variables, tokens(32), decode=True, mutable=["cache"]
  )
  assert np.isfinite(out).all()
  out, _ = model.apply(
    {**variables, **cache}, tokens(1), decode=True, mutable=["cache"]
  )
  assert np.isnan(out).all()


@pytest.mark.slow
def test_padding_changes_no_logit():
  for kind in (sf.nn.LanguageModel, sf.nn.MaskedLanguageModel):
    model, variables = make_model(kind=kind)
    length = jnp.array([12, 5])
    logits = model.apply(variables, tokens(), length)
    padded = jnp.pad(tokens(), ((0, 0), (0, 9)), constant_values=3)
    longer = model.apply(variables, padded, length)
    real = np.arange(12)[None] < np.asarray(length)[:, None]
    np.testing.assert_allclose(
      longer[:, :12][real], logits[real], atol=1e-5, rtol=1e-4
    )


def test_a_masked_model_sees_both_sides():
  model, variables = make_model(kind=sf.nn.MaskedLanguageModel)
  logits = model.apply(variables, tokens())
  for changed in (0, 11):
    other = model.apply(variables, tokens().at[:, changed].add(1) % VOCAB)
    assert np.abs(logits[:, 5] - other[:, 5]).max() > 1e-4


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"num_tokens": 0}, "num_tokens"),
    ({"num_tokens": 30}, "max_len=32"),
    ({"num_tokens": 2, "temperature": 1.0}, "temperature=1.0"),
    ({"num_tokens": 2, "temperature": -1.0}, "temperature=-1.0"),
  ],
)
def test_generate_refuses(kwargs, message):
  model, variables = make_model()
  with pytest.raises(ValueError, match=message):
    sf.nn.generate(model, variables, tokens(3), **kwargs)


def test_decode_refuses():
  decode = {"decode": True, "mutable": ["cache"]}
  model, variables = make_model("cosformer")
  with pytest.raises(ValueError, match="rows of different lengths"):
    model.apply(variables, tokens(), jnp.array([3, 4]), **decode)
  exact, variables = make_model(attention="softmax", feature_map=None)
  with pytest.raises(ValueError, match="decode=True"):
    exact.apply(variables, tokens(), **decode)


def test_init_makes_an_empty_cache():
  for positions in ("learned", "rotary"):
    model, variables = make_model(positions=positions)
    cache = model.init(jax.random.key(0), tokens(), decode=True)["cache"]
    assert not any(
      np.any(leaf > 0) for leaf in jax.tree.leaves(cache)
    )  # sums and counts; exponents start below 0
    decode = {"decode": True, "mutable": ["cache"]}
    out, after = model.apply({**variables, "cache": cache}, tokens(), **decode)
    expected, same = model.apply(variables, tokens(), **decode)
    np.testing.assert_array_equal(out, expected)
    jax.tree.map(np.testing.assert_array_equal, after, same)


def test_generation_drops_what_was_decoded_before():
  model, variables = make_model()
  expected = sf.nn.generate(model, variables, tokens(3), num_tokens=4)
  _, cache = model.apply(variables, tokens(), decode=True, mutable=["cache"])
  found = sf.nn.generate(model, {**variables, **cache}, tokens(3), num_tokens=4)
  np.testing.assert_array_equal(found, expected)


def test_rows_of_different_lengths_are_decoded_together():
  for positions in ("learned", "rotary"):
    model, variables = make_model(positions=positions)
    read = jax.jit(
      lambda variables, tokens, length, model=model: model.apply(
        variables, tokens, length, decode=True, mutable=["cache"]
      )
    )
    pieces, cache = [], {}
    for start, length in ((0, [3, 1]), (4, [2, 4]), (8, [1, 3])):
      out, cache = read(
        {**variables, **cache},
        tokens()[:, start : start + 4],
        jnp.array(length),
      )
      pieces.append((start, length, out))
    for row in range(2):
      text = [
        tokens()[row, start : start + length[row]]
        for start, length, _ in pieces
      ]
      logits = [out[row, : length[row]] for _, length, out in pieces]
      whole = jax.jit(model.apply)(variables, jnp.concatenate(text)[None])
      np.testing.assert_allclose(
        jnp.concatenate(logits), whole[0], atol=1e-5, rtol=1e-4
      )


def test_a_component_that_is_shorter_than_the_model_is_refused():
  with pytest.raises(ValueError, match="max_length=32"):
    make_model("cosformer", max_len=33)
