"""A translator in the style of Flax's wmt: encoder, decoder, beam search.

Cross-attention takes queries of the target and keys of the source, with a mask
of both paddings (and of both segments, where rows are packed). Decoding keeps
Flax's cache for self-attention and calls cross-attention with one query.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import spectraformer_jax as sf
from tests.clients import helpers

SOURCE, TARGET = 9, 7
END = 1


@struct.dataclass
class Config:
  """Options of all parts of the model."""

  encoder_fn: Callable = nn.dot_product_attention
  decoder_fn: Callable = nn.dot_product_attention
  cross_fn: Callable = nn.dot_product_attention
  decode: bool = False


def attention(fn, decode=False):
  """Attention as the example calls it."""
  return nn.MultiHeadDotProductAttention(
    num_heads=helpers.HEADS,
    qkv_features=helpers.WIDTH,
    use_bias=False,
    broadcast_dropout=False,
    dropout_rate=0.0,
    deterministic=False,
    decode=decode,
    attention_fn=fn,
  )


class Block(nn.Module):
  """Self-attention, cross-attention if there is a source, a perceptron."""

  fn: Callable
  cross_fn: Callable | None = None
  decode: bool = False

  @nn.compact
  def __call__(self, x, mask, encoded=None, cross_mask=None):
    y = nn.LayerNorm()(x)
    x = x + attention(self.fn, self.decode)(y, mask=mask)
    if self.cross_fn is not None:
      y = nn.LayerNorm()(x)
      x = x + attention(self.cross_fn)(y, encoded, mask=cross_mask)
    y = nn.Dense(2 * helpers.WIDTH)(nn.LayerNorm()(x))
    return x + nn.Dense(helpers.WIDTH)(nn.relu(y))


class Transformer(nn.Module):
  """Logits of each target token from the source and the tokens before it."""

  config: Config

  def setup(self):
    config = self.config
    self.embed = nn.Embed(helpers.VOCAB, helpers.WIDTH)
    self.source_positions = helpers.Positions(SOURCE)
    self.target_positions = helpers.Positions(TARGET, config.decode)
    self.encoder = [Block(config.encoder_fn) for _ in range(2)]
    self.decoder = [
      Block(config.decoder_fn, config.cross_fn, config.decode) for _ in range(2)
    ]
    self.norms = [nn.LayerNorm(), nn.LayerNorm()]
    self.logits = nn.Dense(helpers.VOCAB)

  def encode(self, inputs, positions=None, segments=None):
    """The source."""
    mask = nn.make_attention_mask(inputs > 0, inputs > 0)
    if segments is not None:
      packing = nn.make_attention_mask(segments, segments, jnp.equal)
      mask = nn.combine_masks(mask, packing)
    x = self.source_positions(self.embed(inputs), positions)
    for block in self.encoder:
      x = block(x, mask)
    return self.norms[0](x)

  def decode(
    self, encoded, inputs, targets, positions=None, segments=(None, None)
  ):
    """Logits of the targets; of the next one token while decoding."""
    y = targets
    if self.config.decode:
      mask = None
      cross_mask = nn.make_attention_mask(
        jnp.ones_like(targets) > 0, inputs > 0
      )
    else:
      mask = nn.combine_masks(
        nn.make_attention_mask(targets > 0, targets > 0),
        nn.make_causal_mask(targets),
      )
      cross_mask = nn.make_attention_mask(targets > 0, inputs > 0)
      y = helpers.shift_right(y)
    of_inputs, of_targets = segments
    if of_inputs is not None:
      mask = nn.combine_masks(
        mask, nn.make_attention_mask(of_targets, of_targets, jnp.equal)
      )
      cross_mask = nn.combine_masks(
        cross_mask, nn.make_attention_mask(of_targets, of_inputs, jnp.equal)
      )
      y = y * (of_targets == helpers.shift_right(of_targets))
    y = self.target_positions(self.embed(y), positions)
    for block in self.decoder:
      y = block(y, mask, encoded, cross_mask)
    return self.logits(self.norms[1](y))

  def __call__(
    self, inputs, targets, positions=(None, None), segments=(None, None)
  ):
    encoded = self.encode(inputs, positions[0], segments[0])
    return self.decode(encoded, inputs, targets, positions[1], segments)


def make_model(cross="oprf", decode=False, encoder="oprf", decoder="posrf"):
  """Makes the model, with softmax if `cross` is None."""
  if cross is None:
    return Transformer(Config(decode=decode))
  return Transformer(
    Config(
      sf.as_attention_fn(*helpers.make_map(encoder)),
      sf.as_attention_fn(*helpers.make_map(decoder), is_causal=True),
      sf.as_attention_fn(*helpers.make_map(cross)),
      decode=decode,
    )
  )


def texts(rng, length, lengths):
  """Rows of words that end with END, and padding."""
  shape = (len(lengths), length)
  words = jax.random.randint(rng, shape, 2, helpers.VOCAB)
  place, last = jnp.arange(length)[None], jnp.array(lengths)[:, None] - 1
  words = jnp.where(place == last, END, words)
  return jnp.where(place <= last, words, 0)


INPUTS = texts(jax.random.key(1), SOURCE, [9, 6, 3])
TARGETS = texts(jax.random.key(2), TARGET, [7, 5, 3])


@pytest.fixture(scope="module")
def params():
  """Parameters that all these models share, untrained."""
  init = jax.jit(make_model(None).init)
  return init(jax.random.key(0), INPUTS, TARGETS)["params"]


def train_model(model, params):
  """Trains on one batch; returns parameters and losses."""

  def loss(params):
    logits = model.apply({"params": params}, INPUTS, TARGETS)
    return helpers.cross_entropy(logits, TARGETS, TARGETS > 0)

  return helpers.fit(loss, params)


@pytest.fixture(scope="module")
def trained(params):
  """Parameters of the default client after training, and its losses."""
  return train_model(make_model(), params)


@pytest.mark.slow
def test_trains_as_with_softmax(params, trained):
  _, original = train_model(make_model(None), params)
  helpers.assert_trains_alike(trained[1], original)


@pytest.mark.slow
@pytest.mark.parametrize("cross", ["oprf", "posrf", "saderf", "elu1"])
@pytest.mark.quick_every(4)
def test_targets_do_not_see_the_future(trained, cross):
  model = make_model(cross)
  logits = jax.jit(
    lambda targets: model.apply({"params": trained[0]}, INPUTS, targets)
  )
  other = helpers.with_other_word(TARGETS, slice(None), 2)
  early = jnp.broadcast_to(jnp.arange(TARGET)[None] <= 2, TARGETS.shape)
  helpers.assert_blind(logits, TARGETS, other, early)


@pytest.mark.slow
def test_padding_has_no_influence(trained):
  logits = jax.jit(
    lambda inputs, targets: make_model().apply(
      {"params": trained[0]}, inputs, targets
    )
  )
  out = logits(INPUTS, TARGETS)
  inputs, targets = INPUTS[1:2, :6], TARGETS[1:2, :5]
  np.testing.assert_allclose(out[1, :5], logits(inputs, targets)[0], atol=2e-5)


@pytest.mark.slow
def test_packed_pairs_are_separate_pairs(trained):
  """Two pairs of texts in one row: masks of two segments over T != S."""
  model = make_model("posrf", encoder="posrf")
  logits = jax.jit(lambda *args: model.apply({"params": trained[0]}, *args))
  sizes = (4, 4), (3, 2)
  rows, positions, segments = [], [], []
  for source, length in ((INPUTS, SOURCE), (TARGETS, TARGET)):
    first, second = (s[0 if source is INPUTS else 1] for s in sizes)
    rest = length - first - second
    rows.append(
      jnp.concatenate(
        [source[0, :first], source[1, :second], jnp.zeros(rest, int)]
      )[None]
    )
    positions.append(jnp.array([[*range(first), *range(second), *range(rest)]]))
    segments.append(jnp.array([[1] * first + [2] * second + [0] * rest]))
  out = logits(*rows, tuple(positions), tuple(segments))[0]
  start = 0
  for row, (source, target) in enumerate(sizes):
    alone = logits(
      INPUTS[row : row + 1, :source], TARGETS[row : row + 1, :target]
    )
    np.testing.assert_allclose(out[start : start + target], alone[0], atol=2e-5)
    start += target


def make_step(model, params, inputs, encoded):
  """A function of cache and tokens ``[B]``: new cache, logits ``[B, L]``."""

  def step(cache, token):
    out, new = model.apply(
      {"params": params, "cache": cache},
      encoded,
      inputs,
      token[:, None],
      mutable=["cache"],
      method=Transformer.decode,
    )
    return new["cache"], out[:, 0]

  return step


def start_decoding(model, params, inputs):
  """Returns the encoded source and an empty cache."""
  encoded = model.apply({"params": params}, inputs, method=Transformer.encode)
  shape = jnp.ones((len(inputs), TARGET), int)
  variables = jax.jit(model.init)(jax.random.key(0), inputs, shape)
  return encoded, variables["cache"]


@pytest.mark.slow
@pytest.mark.parametrize("cross", ["oprf", "posrf"])
@pytest.mark.quick_every(2)
def test_decoding_is_teacher_forcing(trained, cross):
  params, _ = trained
  forced = make_model(cross).apply({"params": params}, INPUTS, TARGETS)
  model = make_model(cross, decode=True)

  @jax.jit
  def decode(params):
    encoded, cache = start_decoding(model, params, INPUTS)
    step = make_step(model, params, INPUTS, encoded)
    return jax.lax.scan(step, cache, helpers.shift_right(TARGETS).T)[1]

  out = decode(params)
  np.testing.assert_allclose(
    jnp.swapaxes(out, 0, 1)[TARGETS > 0], forced[TARGETS > 0], atol=2e-5
  )


def beam_search(model, params, inputs, beams):
  """The best targets by log probability, all of the same length.

  Beams of one example follow each other in the batch; after each step the cache
  is gathered by the beams that live on.

  Returns:
    Tokens ``[B, beams, TARGET]``, the best first, and their scores.
  """
  batch = len(inputs)
  inputs = jnp.repeat(inputs, beams, axis=0)
  encoded, cache = start_decoding(model, params, inputs)
  step = make_step(model, params, inputs, encoded)

  def grow(carry, index):
    cache, tokens, scores = carry
    last = jnp.where(index == 0, 0, tokens[:, :, index - 1])
    cache, logits = step(cache, last.reshape(-1))
    logits = jax.nn.log_softmax(logits).reshape(batch, beams, -1)
    scores, best = jax.lax.top_k(
      (scores[:, :, None] + logits).reshape(batch, -1), beams
    )
    parent, word = best // helpers.VOCAB, best % helpers.VOCAB
    gather = lambda x: jnp.take_along_axis(
      x, parent.reshape(parent.shape + (1,) * (x.ndim - 2)), axis=1
    )
    regroup = lambda x: (
      gather(x.reshape(batch, beams, *x.shape[1:])).reshape(x.shape)
      if x.ndim
      else x
    )
    tokens = gather(tokens).at[:, :, index].set(word)
    return (jax.tree.map(regroup, cache), tokens, scores), None

  tokens = jnp.zeros((batch, beams, TARGET), int)
  scores = jnp.where(jnp.arange(beams)[None] > 0, -1e7, jnp.zeros((batch, 1)))
  (_, tokens, scores), _ = jax.lax.scan(
    grow, (cache, tokens, scores), jnp.arange(TARGET)
  )
  return tokens, scores


@pytest.mark.slow
def test_beam_search(trained):
  params, _ = trained
  tokens, scores = jax.jit(
    lambda params: beam_search(make_model(decode=True), params, INPUTS, 4)
  )(params)
  # The scores are those of teacher forcing.
  flat = tokens.reshape(-1, TARGET)
  logits = make_model().apply(
    {"params": params}, jnp.repeat(INPUTS, 4, axis=0), flat
  )
  words = jax.nn.log_softmax(logits)
  words = jnp.take_along_axis(words, flat[..., None], axis=2)
  forced = words.sum((1, 2)).reshape(scores.shape)
  np.testing.assert_allclose(scores, forced, atol=2e-4)
  # What was learnt by heart is found.
  np.testing.assert_array_equal(tokens[0, 0], TARGETS[0])
