"""A decoder in the style of Flax's gemma: NNX, grouped queries, a filled cache.

The cache has room for the longest text. A prompt is written into it at once:
queries of the prompt meet keys of the whole cache, under a mask
``[B, T, S]``. Tokens follow one by one. Prompts of different lengths are padded
in front or behind, and positions of the rotary embedding count real tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spectraformer_jax as sf
from tests.clients import helpers

HEADS, KV_HEADS = 4, 2
PROMPT, LENGTH = 6, 10


class Projection(nnx.Variable):
  """Random leaves of a feature map, which no optimiser updates."""


def rope(x, positions):
  """Rotates pairs of dimensions of ``[B, T, N, H]`` by positions ``[B, T]``."""
  half = x.shape[-1] // 2
  rate = 100.0 ** -(jnp.arange(half) / half)
  angle = positions[:, :, None, None] * rate[None, None, None]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  one, two = x[..., :half], x[..., half:]
  return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


class Attention(nnx.Module):
  """Grouped-query attention with a cache of keys and values.

  The feature map's variables are an `nnx.Param` and a `Projection`, and the
  adapter is made in each call: so the module can be made inside of `nnx.jit`,
  and a learnable map is trained.
  """

  def __init__(self, feature_map, *, rngs):
    width, dim = helpers.WIDTH, helpers.HEAD_DIM
    self.q = nnx.Einsum("BTD,NDH->BTNH", (HEADS, width, dim), rngs=rngs)
    self.kv = nnx.Einsum(
      "BTD,CKDH->CBTKH", (2, KV_HEADS, width, dim), rngs=rngs
    )
    self.out = nnx.Einsum("BTNH,NHD->BTD", (HEADS, dim, width), rngs=rngs)
    self.feature_map = feature_map
    if feature_map is not None:
      variables = feature_map.init(
        rngs.features(), head_dim=dim, num_heads=KV_HEADS
      )
      self.params = nnx.Param(variables.params)
      self.projection = Projection(variables.projection)

  def variables(self):
    """Returns the variables of the feature map."""
    return sf.FeatureVariables(
      self.params.get_value(), self.projection.get_value()
    )

  def attend(self, query, key, value, mask):
    """Attention under a mask ``[B, T, S]``."""
    if self.feature_map is None:
      return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
    attention = sf.as_dot_product_attention(self.feature_map, self.variables())
    return attention(
      query, key, value, mask=mask[:, None], is_causal=query.shape[1] > 1
    )

  def __call__(self, x, positions, cache, mask):
    """The new cache and the output."""
    query, (key, value) = self.q(x), self.kv(x)
    query, key = rope(query, positions), rope(key, positions)
    if cache is not None:
      start = (0, cache["end"], 0, 0)
      key = jax.lax.dynamic_update_slice(cache["k"], key, start)
      value = jax.lax.dynamic_update_slice(cache["v"], value, start)
      cache = {"k": key, "v": value, "end": cache["end"] + x.shape[1]}
    return cache, self.out(self.attend(query, key, value, mask))

  def init_cache(self, batch):
    """An empty cache."""
    empty = jnp.zeros((batch, LENGTH, KV_HEADS, helpers.HEAD_DIM))
    return {"k": empty, "v": empty, "end": 0}


class StateAttention(Attention):
  """The same with a state of constant size in the place of the cache.

  The mask is ``[B, T]``: which of the new tokens are real.
  """

  def __call__(self, x, positions, cache, mask):
    """The new state and the output."""
    query, (key, value) = self.q(x), self.kv(x)
    out, state = sf.spectral_attention(
      rope(query, positions),
      rope(key, positions),
      value,
      feature_map=self.feature_map,
      variables=self.variables(),
      is_causal=True,
      key_mask=mask,
      initial_state=cache,
      return_state=True,
    )
    return state, self.out(out)

  def init_cache(self, batch):
    """The state before the first token."""
    return sf.init_state(
      self.feature_map,
      self.variables(),
      batch_size=batch,
      num_heads=KV_HEADS,
      head_dim=helpers.HEAD_DIM,
    )


class Block(nnx.Module):
  """Attention and a gated perceptron, each normalised before."""

  def __init__(self, feature_map, attention, *, rngs):
    width = helpers.WIDTH
    self.norm = nnx.RMSNorm(width, rngs=rngs)
    self.attention = attention(feature_map, rngs=rngs)
    self.gate_norm = nnx.RMSNorm(width, rngs=rngs)
    self.gate = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
    self.up = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
    self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)

  def __call__(self, x, positions, cache, mask):
    """The new cache and the output."""
    cache, y = self.attention(self.norm(x), positions, cache, mask)
    x = x + y
    y = self.gate_norm(x)
    return cache, x + self.down(nnx.gelu(self.gate(y)) * self.up(y))


class Transformer(nnx.Module):
  """Logits of the token after each token."""

  def __init__(self, feature_map, attention=Attention, *, rngs):
    self.embed = nnx.Embed(helpers.VOCAB, helpers.WIDTH, rngs=rngs)
    self.blocks = nnx.List(
      [Block(feature_map, attention, rngs=rngs) for _ in range(2)]
    )
    self.norm = nnx.RMSNorm(helpers.WIDTH, rngs=rngs)

  def __call__(self, tokens, positions, cache, mask):
    """Logits ``[B, T, L]`` and the new cache (None without one)."""
    x = self.embed(tokens) * helpers.WIDTH**0.5
    new = []
    for index, block in enumerate(self.blocks):
      x_cache = None if cache is None else cache[index]
      x_cache, x = block(x, positions, x_cache, mask)
      new.append(x_cache)
    return self.embed.attend(self.norm(x)), None if cache is None else new

  def init_cache(self, batch):
    """An empty cache of each block."""
    return [block.attention.init_cache(batch) for block in self.blocks]


def causal_mask(real):
  """``[B, T, T]`` of which tokens ``[B, T]`` are real, as gemma has it."""
  length = real.shape[1]
  return real[:, None, :] & jnp.tril(jnp.ones((1, length, length), bool))


def count_positions(real):
  """Positions that count real tokens."""
  return jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)


def real_tokens(side):
  """Which of ``[3, LENGTH]`` are real: prompts of 6, 4, 1 tokens, then 4."""
  place, lengths = jnp.arange(PROMPT)[None], jnp.array([6, 4, 1])[:, None]
  real = place < lengths if side == "behind" else place >= PROMPT - lengths
  return jnp.pad(real, ((0, 0), (0, LENGTH - PROMPT)), constant_values=True)


TOKENS = jax.random.randint(jax.random.key(5), (3, LENGTH), 1, helpers.VOCAB)


@functools.cache
def make_model(component="posrf", matrix="orf", attention=Attention):
  """Makes a model inside of jit, as is usual for large ones."""
  fm = None
  if component is not None:
    fm = sf.feature_map(component, matrix, num_features=64)
  return nnx.jit(
    lambda: Transformer(fm, attention, rngs=nnx.Rngs(params=0, features=1))
  )()


def apply_whole(model):
  """A function of tokens and which are real: all logits at once."""
  graph, state = nnx.split(model)

  @jax.jit
  def logits(state, tokens, real):
    model = nnx.merge(graph, state)
    return model(tokens, count_positions(real), None, causal_mask(real))[0]

  return functools.partial(logits, state)


def train_model(model):
  """Trains for some steps; returns the model and the losses."""
  real = real_tokens("behind")
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
  known = real[:, :-1]

  def loss(params):
    model = nnx.merge(graph, params, rest)
    logits, _ = model(inputs, count_positions(known), None, causal_mask(known))
    return helpers.cross_entropy(logits, targets, known & real[:, 1:])

  params, losses = helpers.fit(loss, params)
  return nnx.merge(graph, params, rest), losses


@pytest.fixture(scope="module")
def original():
  """Losses with softmax attention."""
  return train_model(make_model(None))[1]


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["orf", "learned_orf"])
def test_trains_as_with_softmax(original, matrix):
  before = make_model(matrix=matrix)
  after, losses = train_model(before)
  helpers.assert_trains_alike(losses, original)
  first, last = (m.blocks[0].attention.variables() for m in (before, after))
  assert jax.tree.map(np.array_equal, first, last) == sf.FeatureVariables(
    jax.tree.map(lambda _: False, first.params),
    jax.tree.map(lambda _: True, first.projection),
  )


@pytest.mark.parametrize("side", ["front", "behind"])
def test_nothing_leaks(side):
  real, function = real_tokens(side), apply_whole(make_model())
  logits = lambda tokens: function(tokens, real)
  early = jnp.broadcast_to(jnp.arange(LENGTH)[None] < 7, TOKENS.shape)
  other = helpers.with_other_word(TOKENS, slice(None), 7)
  helpers.assert_blind(logits, TOKENS, other, early)
  # What padding holds is seen by nobody else.
  other = jnp.where(real, TOKENS, TOKENS % (helpers.VOCAB - 1) + 1)
  helpers.assert_blind(logits, TOKENS, other, real)
  # Padding is as if it was not there.
  here = np.flatnonzero(real[1])
  alone = function(TOKENS[1:2, here], jnp.ones((1, len(here)), bool))
  np.testing.assert_allclose(logits(TOKENS)[1, here], alone[0], atol=2e-5)


@pytest.mark.parametrize("side", ["front", "behind"])
@pytest.mark.parametrize("attention", [Attention, StateAttention])
@pytest.mark.quick_every(3)
def test_prompt_then_tokens_is_teacher_forcing(side, attention):
  real = real_tokens(side)
  positions = count_positions(real)
  model = make_model(attention=attention)
  graph, state = nnx.split(model)
  with_state = attention is StateAttention

  @jax.jit
  def run(state):
    model = nnx.merge(graph, state)
    cache = model.init_cache(len(TOKENS))
    prompt = slice(0, PROMPT)
    mask = real[:, prompt]
    if not with_state:
      room = ((0, 0), (0, 0), (0, LENGTH - PROMPT))
      mask = jnp.pad(causal_mask(mask), room)
    out, cache = model(TOKENS[:, prompt], positions[:, prompt], cache, mask)

    def step(cache, index):
      one = lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=1)
      mask = one(real)
      if not with_state:
        mask = (real & (jnp.arange(LENGTH)[None] <= index))[:, None]
      out, cache = model(one(TOKENS), one(positions), cache, mask)
      return cache, out[:, 0]

    _, rest = jax.lax.scan(step, cache, jnp.arange(PROMPT, LENGTH))
    return jnp.concatenate([out, jnp.swapaxes(rest, 0, 1)], axis=1)

  forced = apply_whole(make_model())(TOKENS, real)
  np.testing.assert_allclose(run(state)[real], forced[real], atol=2e-5)
