"""Generation: ragged prompts, ends, draws from the likeliest, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.nn.generation import _Options
from tests.nn.helpers import with_larger_embeddings

VOCAB = 11
PROMPT = jax.random.randint(jax.random.key(1), (3, 5), 0, VOCAB)
LENGTH = jnp.array([5, 1, 3])


@functools.cache
def make_model(component="posrf", positions="learned", kind="language"):
  """A model whose logits depend on their input, and its variables."""
  matrix, rows, options = "orf", 8, {}
  if component == "cosformer":
    matrix, rows, options = "none", None, {"max_length": 16}
  if component == "oprf":
    options = {"statistics": "ema"}
  fm = sf.feature_map(
    component, matrix, num_features=rows, component_kwargs=options
  )
  sizes = {"vocab_size": VOCAB, "max_len": 16, "embed_dim": 8, "num_layers": 1}
  sizes |= {"head_dim": 4, "mlp_dim": 8, "positions": positions}
  if kind == "language":
    model, inputs = sf.nn.LanguageModel(feature_map=fm, **sizes), ()
  else:
    model, inputs = sf.nn.Seq2Seq(feature_map=fm, **sizes), (PROMPT, LENGTH)
  variables = jax.jit(model.init)(jax.random.key(0), *inputs, PROMPT)
  return model, with_larger_embeddings(variables)


def inputs_of(kind, rows=slice(None)):
  if kind == "language":
    return {}
  return {"source": PROMPT[rows, ::-1], "source_length": LENGTH[::-1][rows]}


@pytest.mark.parametrize(
  ("component", "positions", "kind"),
  [
    ("posrf", "learned", "language"),
    ("posrf", "rotary", "seq2seq"),
    ("oprf", "rotary", "language"),
    ("posrf", "sinusoidal", "seq2seq"),
  ],
)
@pytest.mark.quick_every(4)
def test_ragged_prompts_are_as_if_alone(component, positions, kind):
  model, variables = make_model(component, positions, kind)
  generate = functools.partial(sf.nn.generate, model, variables, num_tokens=6)
  for padding in (0, VOCAB + 5, -1):
    real = jnp.arange(5)[None] < LENGTH[:, None]
    found = generate(
      jnp.where(real, PROMPT, padding),
      prompt_length=LENGTH,
      **inputs_of(kind),
    )
    if padding == 0:
      first = found
    np.testing.assert_array_equal(found, first)
  traced = jax.jit(
    lambda prompt, length: generate(
      prompt, prompt_length=length, **inputs_of(kind)
    )
  )
  np.testing.assert_array_equal(traced(PROMPT, LENGTH), first)
  for row in (1, 2):
    alone = generate(
      PROMPT[row : row + 1, : LENGTH[row]],
      **inputs_of(kind, slice(row, row + 1)),
    )
    np.testing.assert_array_equal(first[row], alone[0])
  assert len(np.unique(first)) > 2
  # As long as they are: the same program as without lengths.
  np.testing.assert_array_equal(
    generate(PROMPT, prompt_length=[5, 5, 5], **inputs_of(kind)),
    generate(PROMPT, **inputs_of(kind)),
  )


def test_what_follows_the_end_is_the_end():
  model, variables = make_model()
  free = np.asarray(sf.nn.generate(model, variables, PROMPT, num_tokens=8))
  end = int(free[0, 2])
  ended = sf.nn.generate(model, variables, PROMPT, num_tokens=8, end_token=end)
  expected = free.copy()
  for row in expected:
    (places,) = np.nonzero(row == end)
    if places.size:
      row[places[0] :] = end
  np.testing.assert_array_equal(ended, expected)
  assert (np.asarray(ended)[0, 2:] == end).all()


def draws(logits, **options):
  """Shares of 4000 draws from logits of one row, float64."""
  defaults = {"temperature": 1.0, "top_k": None, "top_p": None}
  options = _Options(num_tokens=1, end_token=None, **defaults | options)
  rows = jnp.broadcast_to(jnp.array(logits), (4000, len(logits)))
  tokens = options.choose(jax.random.key(0), rows)
  return np.bincount(tokens, minlength=len(logits)) / 4000


@pytest.mark.parametrize(
  ("options", "kept"),
  [
    ({}, [0, 1, 2, 3]),
    ({"top_k": 2}, [1, 3]),
    ({"top_k": 1}, [1]),
    ({"top_p": 0.3}, [1]),
    ({"top_p": 0.69}, [1, 3]),
    ({"top_p": 0.71}, [0, 1, 3]),
    ({"top_p": 1.0}, [0, 1, 2, 3]),
    # Of the two that are left the first has 4 / 7 of the probability.
    ({"top_k": 2, "top_p": 0.5}, [1]),
    ({"top_k": 2, "top_p": 0.6}, [1, 3]),
    ({"temperature": 0.5}, [0, 1, 2, 3]),
  ],
)
def test_draws_are_of_the_likeliest(options, kept):
  share = np.array([0.2, 0.4, 0.1, 0.3]) ** (1 / options.get("temperature", 1))
  found = draws(np.log([0.2, 0.4, 0.1, 0.3]), **options)
  expected = np.where(np.isin(np.arange(4), kept), share, 0.0)
  expected /= expected.sum()
  assert (found[expected == 0] == 0).all()
  np.testing.assert_allclose(found, expected, atol=0.03)  # 4 deviations


def test_what_overflows_is_loud():
  for wrong in (jnp.nan, jnp.inf):
    found = _Options(1, None, 0.0, None, None).choose(
      jax.random.key(0), jnp.array([[0.0, 1.0], [0.0, wrong]])
    )
    assert found.tolist() == [1, -1]
  for temperature in (1e-38, 1e-45):
    found = _Options(1, None, temperature, 2, None).choose(
      jax.random.key(0), jnp.array([[0.0, 50.0]])
    )
    assert found.tolist() == [-1]


@pytest.mark.slow
def test_draws_through_generate():
  model, variables = make_model()
  generate = functools.partial(
    sf.nn.generate, model, variables, PROMPT, num_tokens=5
  )
  draw = functools.partial(generate, rng=jax.random.key(2), temperature=2.0)
  np.testing.assert_array_equal(draw(top_k=1), generate())
  np.testing.assert_array_equal(draw(top_p=1e-6), generate())
  assert (np.asarray(draw()) != np.asarray(generate())).any()


def test_what_is_not_known_to_be_wrong_is_loud():
  model, variables = make_model()
  generate = jax.jit(
    lambda prompt, length: sf.nn.generate(
      model, variables, prompt, num_tokens=3, prompt_length=length
    )
  )
  wrong = generate(PROMPT.at[1, 0].set(VOCAB), jnp.array([5, 5, 0]))
  np.testing.assert_array_equal(wrong[1:], -1)
  np.testing.assert_array_equal(
    wrong[0], sf.nn.generate(model, variables, PROMPT, num_tokens=3)[0]
  )


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"temperature": float("nan")}, "temperature=nan must be 0, or positive"),
    ({"temperature": float("inf")}, "temperature=inf must be 0, or positive"),
    ({"temperature": "warm"}, "temperature must be a number, got 'warm'"),
    ({"temperature": jnp.ones(2)}, "temperature must be a number"),
    ({"top_k": 3}, "top_k=3.* need a temperature above 0"),
    ({"top_p": 0.5}, "top_p=0.5 need a temperature above 0"),
    ({"temperature": 1.0, "top_k": 0}, "top_k must be an int from 1 to"),
    ({"temperature": 1.0, "top_k": 12}, "top_k must be an int from 1 to"),
    ({"temperature": 1.0, "top_k": 2.5}, "top_k must be an int from 1 to"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p must be in"),
    ({"temperature": 1.0, "top_p": float("nan")}, "top_p must be in"),
    ({"end_token": VOCAB}, "end_token must be in"),
    ({"end_token": -1}, "end_token must be in"),
    ({"prompt_length": [5, 0, 3]}, "prompt_length must be from 1 to"),
    ({"prompt_length": [5, 6, 3]}, "prompt_length must be from 1 to"),
    ({"prompt_length": 3}, "prompt_length must be ints"),
    ({"prompt_length": [[5], [1], [3]]}, "prompt_length must be ints"),
    ({"source": PROMPT}, "source=given with a LanguageModel"),
    ({"num_tokens": 12}, "must fit max_len=16"),
    ({"prompt": PROMPT[0]}, "prompt must be ints"),
    ({"prompt": PROMPT * 1.0}, "prompt must be ints"),
    ({"prompt": PROMPT.at[0, 0].set(VOCAB)}, "prompt must be in .*, got 11"),
    ({"prompt": PROMPT.at[0, 0].set(-1)}, "prompt must be in .*, got -1"),
    ({"variables": None}, "variables must be those of model.init"),
    ({"variables": {}}, "variables must be those of model.init"),
  ],
)
def test_generate_refuses(options, words):
  model, variables = make_model()
  options = {
    "variables": variables,
    "prompt": PROMPT,
    "num_tokens": 2,
    "rng": jax.random.key(0),
  } | options
  with pytest.raises(ValueError, match=words):
    sf.nn.generate(model, **options)


def test_generate_refuses_what_it_cannot_do():
  model, variables = make_model("cosformer")
  with pytest.raises(ValueError, match="rows of different lengths"):
    sf.nn.generate(model, variables, PROMPT, num_tokens=2, prompt_length=LENGTH)
  model, variables = make_model(kind="seq2seq", positions="rotary")
  with pytest.raises(ValueError, match="source=None with a Seq2Seq"):
    sf.nn.generate(model, variables, PROMPT, num_tokens=2)
  with pytest.raises(ValueError, match="source must be in .*got 11"):
    sf.nn.generate(
      model,
      variables,
      PROMPT,
      num_tokens=2,
      source=PROMPT.at[0, 0].set(VOCAB),
    )

  def traced(temperature):
    return sf.nn.generate(
      *make_model(), PROMPT, num_tokens=2, temperature=temperature
    )

  with pytest.raises(ValueError, match="temperature must be a number, got a t"):
    jax.jit(traced)(1.0)


@pytest.mark.slow
def test_numbers_of_numpy_are_numbers():
  model, variables = make_model()
  generate = functools.partial(sf.nn.generate, model, variables)
  rng = jax.random.key(0)
  np.testing.assert_array_equal(
    generate(
      PROMPT.tolist(),
      num_tokens=2,
      rng=rng,
      temperature=np.float32(0.5),
      top_k=np.int64(3),
      end_token=jnp.int32(1),
    ),
    generate(
      PROMPT, num_tokens=2, rng=rng, temperature=0.5, top_k=3, end_token=1
    ),
  )
