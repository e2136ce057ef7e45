"""A small decoder in Equinox: one example at a time, `jax.vmap` over the batch.

The feature map is a static field and its variables are another, so they are
leaves of the model: `eqx.partition` keeps the projection from the optimiser.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spectraformer_jax as sf
from tests.clients import helpers

LENGTH = 10


class Attention(eqx.Module):
  """Causal self-attention of one example ``[T, D]``."""

  query: eqx.nn.Linear
  key: eqx.nn.Linear
  value: eqx.nn.Linear
  out: eqx.nn.Linear
  variables: sf.FeatureVariables | None
  feature_map: sf.FeatureMap | None = eqx.field(static=True)

  def __init__(self, feature_map, *, key):
    *keys, last = jax.random.split(key, 5)
    inner = helpers.HEADS * helpers.HEAD_DIM
    self.query, self.key, self.value = (
      eqx.nn.Linear(helpers.WIDTH, inner, use_bias=False, key=k)
      for k in keys[:3]
    )
    self.out = eqx.nn.Linear(inner, helpers.WIDTH, use_bias=False, key=keys[3])
    self.feature_map, self.variables = feature_map, None
    if feature_map is not None:
      self.variables = feature_map.init(
        last, head_dim=helpers.HEAD_DIM, num_heads=helpers.HEADS
      )

  def __call__(self, x, length):
    """Attends; tokens from `length` on are padding."""
    query, key, value = (
      jax.vmap(layer)(x).reshape(len(x), helpers.HEADS, helpers.HEAD_DIM)
      for layer in (self.query, self.key, self.value)
    )
    attention = jax.nn.dot_product_attention
    if self.feature_map is not None:
      attention = sf.as_dot_product_attention(self.feature_map, self.variables)
    real = jnp.arange(len(x)) < length
    mask = jnp.tril(jnp.broadcast_to(real[None], (len(x), len(x))))
    out = attention(query, key, value, mask=mask[None], is_causal=True)
    return jax.vmap(self.out)(out.reshape(len(x), -1))


class Block(eqx.Module):
  """Attention and a perceptron, each normalised before."""

  norms: list
  attention: Attention
  mlp: eqx.nn.MLP

  def __init__(self, feature_map, *, key):
    first, second = jax.random.split(key)
    width = helpers.WIDTH
    self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]
    self.attention = Attention(feature_map, key=first)
    self.mlp = eqx.nn.MLP(width, width, 2 * width, 1, key=second)

  def __call__(self, x, length):
    """One block of one example."""
    x = x + self.attention(jax.vmap(self.norms[0])(x), length)
    return x + jax.vmap(lambda y: self.mlp(self.norms[1](y)))(x)


class Decoder(eqx.Module):
  """Logits of the token after each token of one example ``[T]``."""

  embed: eqx.nn.Embedding
  positions: jax.Array
  blocks: list
  head: eqx.nn.Linear

  def __init__(self, feature_map, *, key):
    keys = jax.random.split(key, 5)
    width = helpers.WIDTH
    self.embed = eqx.nn.Embedding(helpers.VOCAB, width, key=keys[0])
    self.positions = jax.random.normal(keys[1], (LENGTH, width))
    self.blocks = [Block(feature_map, key=k) for k in keys[2:4]]
    self.head = eqx.nn.Linear(width, helpers.VOCAB, key=keys[4])

  def __call__(self, tokens, length):
    """Logits ``[T, L]``."""
    x = jax.vmap(self.embed)(tokens) + self.positions[: len(tokens)]
    for block in self.blocks:
      x = block(x, length)
    return jax.vmap(self.head)(x)


TOKENS = jax.random.randint(jax.random.key(4), (3, LENGTH), 1, helpers.VOCAB)
LENGTHS = jnp.array([10, 6, 2])
REAL = jnp.arange(LENGTH)[None] < LENGTHS[:, None]


@functools.cache
def make_model(component="posrf", matrix="orf"):
  """Makes a model, with softmax if `component` is None."""
  fm = component and sf.feature_map(component, matrix, num_features=64)
  return eqx.filter_jit(Decoder)(fm, key=jax.random.key(0))


@pytest.fixture(scope="module")
def batched():
  """A function of tokens: logits of all examples of an untrained model."""
  model = make_model()
  return jax.jit(lambda tokens: jax.vmap(model)(tokens, LENGTHS))


def train_model(model):
  """Trains with weight decay; returns the model and the losses."""
  params, fixed = eqx.partition(model, sf.trainable(model))

  def loss(params):
    model = eqx.combine(params, fixed)
    logits = jax.vmap(model)(TOKENS[:, :-1], LENGTHS - 1)
    return helpers.cross_entropy(logits, TOKENS[:, 1:], REAL[:, 1:])

  params, losses = helpers.fit(
    loss, params, optax.adamw(1e-2, weight_decay=0.1)
  )
  return eqx.combine(params, fixed), losses


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["orf", "learned_orf"])
def test_trains_as_with_softmax(matrix):
  before = make_model(matrix=matrix)
  after, losses = train_model(before)
  helpers.assert_trains_alike(losses, train_model(make_model(None))[1])
  first, last = (m.blocks[0].attention.variables for m in (before, after))
  assert jax.tree.map(np.array_equal, first, last) == sf.FeatureVariables(
    jax.tree.map(lambda _: False, first.params),
    jax.tree.map(lambda _: True, first.projection),
  )


@pytest.mark.slow
def test_nothing_leaks(batched):
  early = jnp.broadcast_to(jnp.arange(LENGTH)[None] < 5, TOKENS.shape)
  other = helpers.with_other_word(TOKENS, slice(None), 5)
  helpers.assert_blind(batched, TOKENS, other, early)
  # What padding holds, and other examples, are seen by nobody.
  other = jnp.where(REAL, TOKENS, TOKENS % (helpers.VOCAB - 1) + 1)
  helpers.assert_blind(batched, TOKENS, other, REAL)
  other = helpers.with_other_word(TOKENS, 1, 0)
  helpers.assert_blind(batched, TOKENS, other, jnp.arange(3) != 1)


@pytest.mark.slow
def test_vmap_is_a_batch(batched):
  """One example at a time, and all in one call, are the same."""
  alone = make_model()(TOKENS[1], LENGTHS[1])
  np.testing.assert_allclose(batched(TOKENS)[1], alone, atol=2e-5)
