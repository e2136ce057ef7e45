"""Attention to a memory, and encoder-decoders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.nn.helpers import make_map, normal, with_larger_embeddings

VOCAB = 11
SOURCE = jax.random.randint(jax.random.key(1), (2, 7), 0, VOCAB)
LENGTH = jnp.array([7, 3])
TARGET = jax.random.randint(jax.random.key(2), (2, 9), 0, VOCAB)


MAPS = {
  "posrf": make_map(),
  "oprf ema": make_map("oprf", statistics="ema"),
  "trigrf": make_map("trigrf"),
  "softmax": None,
}


@functools.cache
def make_model(name="posrf", positions="learned", **kwargs):
  """A model whose logits depend on both its inputs, and its variables."""
  sizes = {"vocab_size": VOCAB, "max_len": 16, "embed_dim": 8, "num_layers": 1}
  sizes |= {"head_dim": 4, "mlp_dim": 8, "positions": positions}
  sizes |= {"attention": "softmax" if name == "softmax" else "spectral"}
  model = sf.nn.Seq2Seq(feature_map=MAPS[name], **sizes, **kwargs)
  variables = jax.jit(model.init)(jax.random.key(0), SOURCE, LENGTH, TARGET)
  return model, with_larger_embeddings(variables)


@functools.cache
def jit_apply(model):
  return jax.jit(model.apply, static_argnames=("decode", "mutable"))


OPTIONS = (
  ("posrf", "rotary"),
  ("oprf ema", "learned"),
  ("trigrf", "rotary"),
  ("posrf", "learned"),
)


@pytest.mark.parametrize(
  ("name", "positions"), [*OPTIONS, ("softmax", "learned")]
)
@pytest.mark.quick_every(5)
def test_nothing_leaks(name, positions):
  model, variables = make_model(name, positions)
  apply = jit_apply(model)
  logits = apply(variables, SOURCE, LENGTH, TARGET)
  later = apply(
    variables, SOURCE, LENGTH, TARGET.at[:, 7].set((TARGET[:, 7] + 1) % VOCAB)
  )
  np.testing.assert_array_equal(later[:, :7], logits[:, :7])
  assert np.abs(later[:, 7:] - logits[:, 7:]).max() > 1e-3
  # What the source's padding holds, and how much there is.
  real = jnp.arange(7)[None] < LENGTH[:, None]
  for filler in (0, VOCAB, -1):
    other = apply(variables, jnp.where(real, SOURCE, filler), LENGTH, TARGET)
    np.testing.assert_array_equal(other, logits)
  alone = apply(variables, SOURCE[1:, :3], LENGTH[1:], TARGET[1:])
  np.testing.assert_allclose(alone[0], logits[1], atol=1e-5)
  # The source is read.
  changed = SOURCE.at[:, 0].set((SOURCE[:, 0] + 1) % VOCAB)
  assert np.abs(apply(variables, changed, LENGTH, TARGET) - logits).max() > 1e-3


@pytest.mark.parametrize(("name", "positions"), OPTIONS)
@pytest.mark.quick_every(4)
def test_decoding_equals_teacher_forcing(name, positions):
  model, variables = make_model(name, positions)
  apply = jit_apply(model)
  whole = apply(variables, SOURCE, LENGTH, TARGET)
  cache, parts, sizes = {}, [], []
  source = SOURCE, LENGTH
  for start, stop in ((0, 4), (4, 5), (5, 9)):
    out, cache = apply(
      {**variables, **cache},
      *source,
      TARGET[:, start:stop],
      decode=True,
      mutable=("cache",),
    )
    parts.append(out)
    source = None, None
    sizes.append(jax.tree.map(jnp.shape, cache))
  np.testing.assert_allclose(
    jnp.concatenate(parts, axis=1), whole, atol=1e-5, rtol=1e-4
  )
  assert sizes[0] == sizes[1] == sizes[2]


def test_generation_is_what_recomputation_gives():
  model, variables = make_model("posrf", "rotary")
  new = sf.nn.generate(
    model,
    variables,
    TARGET[:, :1],
    num_tokens=6,
    source=SOURCE,
    source_length=LENGTH,
  )
  text = jnp.concatenate([TARGET[:, :1], new], axis=1)
  logits = jit_apply(model)(variables, SOURCE, LENGTH, text)
  np.testing.assert_array_equal(jnp.argmax(logits[:, :-1], -1), new)
  assert len(np.unique(new)) > 1


def test_init_makes_an_empty_cache():
  model, variables = make_model("posrf", "rotary")
  init = jax.jit(functools.partial(model.init, decode=True))
  cache = init(jax.random.key(0), SOURCE, LENGTH, TARGET)["cache"]
  decode = {"decode": True, "mutable": ("cache",)}
  apply = jit_apply(model)
  out, _ = apply(
    {**variables, "cache": cache}, SOURCE, LENGTH, TARGET, **decode
  )
  expected, _ = apply(variables, SOURCE, LENGTH, TARGET, **decode)
  np.testing.assert_array_equal(out, expected)
  with pytest.raises(ValueError, match="no memory in the cache"):
    model.apply({**variables, "cache": cache}, None, None, TARGET, **decode)


@pytest.mark.slow
def test_gradients_are_finite_whatever_padding_holds():
  model, variables = make_model("oprf ema")
  target_length = jnp.array([4, 9])
  real = jnp.arange(9)[None] < target_length[:, None]

  @jax.jit
  def grad(params, source, target):
    def loss(params):
      logits = model.apply(
        {**variables, "params": params}, source, LENGTH, target, target_length
      )
      return jnp.sum(jnp.where(real[:, :, None], jnp.sin(logits), 0))

    return jax.grad(loss)(params)

  real_source = jnp.arange(7)[None] < LENGTH[:, None]
  hold = lambda filler: (
    jnp.where(real_source, SOURCE, filler),
    jnp.where(real, TARGET, filler),
  )
  expected = grad(variables["params"], *hold(0))
  found = grad(variables["params"], *hold(VOCAB))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  for leaf in jax.tree.leaves(expected):
    assert np.isfinite(leaf).all()


def make_cross_attention(x, memory, memory_mask=None, **kwargs):
  """A layer, and its variables."""
  options = {"num_heads": 2, "head_dim": 4} | kwargs
  layer = sf.nn.SpectralCrossAttention(**options)
  return layer, layer.init(jax.random.key(0), x, memory, None, memory_mask)


@pytest.mark.parametrize(
  "kwargs",
  [
    {"feature_map": make_map("oprf")},
    {"attention": "gaussian"},
    {"feature_map": make_map("saderf")},
    {"feature_map": make_map("oprf"), "num_key_value_heads": 1},
  ],
)
@pytest.mark.quick_every(4)
def test_no_query_is_seen_by_another(kwargs):
  x, memory = normal(1, 2, 6, 8), normal(2, 2, 5, 12)
  mask = jnp.array([[True] * 5, [True] * 2 + [False] * 3])
  layer, variables = make_cross_attention(x, memory, **kwargs)
  apply = jax.jit(layer.apply)
  out = apply(variables, x, memory, None, mask)
  other = apply(variables, x.at[:, 4].mul(9.0), memory, None, mask)
  np.testing.assert_array_equal(np.delete(other, 4, 1), np.delete(out, 4, 1))
  # NaN in either's padding, values and gradients.
  real = jnp.array([[True] * 6, [True] * 4 + [False] * 2])

  @jax.jit
  def value_and_grads(x, memory):
    def loss(variables, x, memory):
      y = layer.apply(variables, x, memory, real, mask)
      return jnp.sum(jnp.where(real[:, :, None], jnp.sin(y), 0))

    return jax.value_and_grad(loss, (0, 1, 2))(variables, x, memory)

  hold = lambda filler: (
    jnp.where(real[:, :, None], x, filler),
    jnp.where(mask[:, :, None], memory, filler),
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    value_and_grads(*hold(jnp.nan)),
    value_and_grads(*hold(0.0)),
  )


def test_it_is_near_exact_attention():
  x, memory = normal(1, 2, 6, 8), normal(2, 2, 5, 8)
  fm = sf.feature_map("oprf", "orf", num_features=4096)
  layer, variables = make_cross_attention(x, memory, feature_map=fm)
  exact = sf.nn.SpectralCrossAttention(
    num_heads=2, head_dim=4, attention="softmax"
  )
  attend = lambda x: exact.apply({"params": variables["params"]}, x, memory)
  error = np.abs(layer.apply(variables, x, memory) - attend(x)).mean()
  assert error < 0.1 * np.abs(attend(0 * x) - attend(x)).mean()


@pytest.mark.parametrize(
  ("kwargs", "arguments", "options", "words"),
  [
    ({"attention": "local"}, (), {}, "attention='local' cannot attend"),
    ({}, (), {}, "'spectral' needs a feature map"),
    (
      {"feature_map": sf.feature_map("cosformer", "none", num_features=None)},
      (),
      {},
      "component 'cosformer' depends on the positions",
    ),
    (
      {"attention": "softmax"},
      (),
      {"decode": True},
      "decode=True with attention='softmax'",
    ),
    (
      {"feature_map": make_map()},
      (normal(2, 3, 5, 8),),
      {},
      "must share batch",
    ),
    ({"feature_map": make_map()}, (None,), {}, "memory=None needs decode"),
    (
      {"feature_map": make_map()},
      (normal(2, 2, 5, 8), None, jnp.ones((2, 4), bool)),
      {},
      r"memory_mask must be \[batch, length\] = \[2, 5\]",
    ),
    (
      {"feature_map": make_map(), "num_key_value_heads": 3},
      (),
      {},
      "num_key_value_heads=3 must divide num_heads=2",
    ),
  ],
)
def test_cross_attention_refuses(kwargs, arguments, options, words):
  layer = sf.nn.SpectralCrossAttention(
    **{"num_heads": 2, "head_dim": 4} | kwargs
  )
  arguments = arguments or (normal(2, 2, 5, 8),)
  with pytest.raises(ValueError, match=words):
    layer.init(jax.random.key(0), normal(1, 2, 6, 8), *arguments, **options)


def test_seq2seq_refuses():
  model, variables = make_model("posrf", "rotary")
  apply = functools.partial(jax.eval_shape, model.apply, variables)
  with pytest.raises(ValueError, match="source and target must share batch"):
    apply(SOURCE[:1], LENGTH[:1], TARGET)
  with pytest.raises(ValueError, match="source_length must be ints"):
    apply(SOURCE, 3, TARGET)
  with pytest.raises(ValueError, match="source must be ints"):
    apply(SOURCE[0], LENGTH, TARGET)
  with pytest.raises(ValueError, match="leak the future"):
    sf.nn.Seq2Seq(
      vocab_size=VOCAB, max_len=16, feature_map=make_map("oprf")
    ).init(jax.random.key(0), SOURCE, LENGTH, TARGET)
  encoder = sf.nn.Encoder(feature_map=make_map())
  x = normal(1, 2, 6, 8)
  with pytest.raises(ValueError, match="memory needs attends_memory=True"):
    encoder.init(jax.random.key(0), x, memory=x)
