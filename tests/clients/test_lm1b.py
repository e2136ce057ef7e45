"""A decoder in the style of Flax's lm1b: Linen, packed rows, cached decoding.

Rows hold several texts. The mask is that of the example: padding, the causal
triangle and `make_attention_mask(segments, segments, jnp.equal)`, combined, as
an array of the model's dtype, made and traced inside of jit.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import spectraformer_jax as sf
from tests.clients import helpers

LENGTH = 12
# Three rows: three texts and padding, two texts, one text and padding.
SEGMENTS = jnp.array(
  [
    [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0],
    [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
    [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
  ]
)
STARTS = jnp.where(
  jnp.pad(SEGMENTS[:, 1:] != SEGMENTS[:, :-1], ((0, 0), (1, 0))),
  jnp.arange(LENGTH)[None],
  0,
)
POSITIONS = jnp.arange(LENGTH)[None] - jax.lax.cummax(STARTS, axis=1)
TOKENS = jnp.where(
  SEGMENTS > 0,
  jax.random.randint(jax.random.key(3), SEGMENTS.shape, 1, helpers.VOCAB),
  0,
)


@struct.dataclass
class Config:
  """Options of all parts of the model."""

  attention_fn: Callable = nn.dot_product_attention
  dtype: Any = jnp.float32
  decode: bool = False


class Block(nn.Module):
  """Self-attention and a perceptron, each normalised before."""

  config: Config

  @nn.compact
  def __call__(self, x, mask=None):
    y = nn.LayerNorm(dtype=self.config.dtype)(x)
    x = x + nn.MultiHeadDotProductAttention(
      num_heads=helpers.HEADS,
      dtype=self.config.dtype,
      qkv_features=helpers.WIDTH,
      use_bias=False,
      broadcast_dropout=False,
      dropout_rate=0.0,
      deterministic=False,
      decode=self.config.decode,
      attention_fn=self.config.attention_fn,
    )(y, mask=mask)
    y = nn.LayerNorm(dtype=self.config.dtype)(x)
    y = nn.Dense(2 * helpers.WIDTH, dtype=self.config.dtype)(y)
    return x + nn.Dense(helpers.WIDTH, dtype=self.config.dtype)(nn.relu(y))


class TransformerLM(nn.Module):
  """Logits of each token from those before it in its text."""

  config: Config

  @nn.compact
  def __call__(self, inputs, positions=None, segments=None):
    dtype, mask, y = self.config.dtype, None, inputs
    if not self.config.decode:
      mask = nn.combine_masks(
        nn.make_attention_mask(inputs > 0, inputs > 0, dtype=dtype),
        nn.make_causal_mask(inputs, dtype=dtype),
      )
      y = helpers.shift_right(y)
    if segments is not None:
      mask = nn.combine_masks(
        mask, nn.make_attention_mask(segments, segments, jnp.equal, dtype=dtype)
      )
      y = y * (segments == helpers.shift_right(segments))
    y = nn.Embed(helpers.VOCAB, helpers.WIDTH)(y)
    y = helpers.Positions(LENGTH, self.config.decode)(y, positions).astype(
      dtype
    )
    for _ in range(2):
      y = Block(self.config)(y, mask)
    return nn.Dense(helpers.VOCAB)(nn.LayerNorm(dtype=dtype)(y))


def make_model(component="posrf", decode=False, dtype=jnp.float32, **kwargs):
  """Makes the model, with softmax if `component` is None."""
  if component is None:
    return TransformerLM(Config(decode=decode, dtype=dtype))
  fm, variables = helpers.make_map(component, **kwargs)
  fn = sf.as_attention_fn(fm, variables, is_causal=True)
  return TransformerLM(Config(fn, decode=decode, dtype=dtype))


@pytest.fixture(scope="module")
def params():
  """Parameters that all these models share."""
  return jax.jit(make_model(None).init)(jax.random.key(0), TOKENS)["params"]


def apply_packed(model, params):
  """Returns a jitted function of tokens, with the masks of packed rows."""
  return jax.jit(
    lambda tokens: model.apply({"params": params}, tokens, POSITIONS, SEGMENTS)
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.quick_every(2)
def test_packed_rows_train_as_with_softmax(params, dtype):
  def losses(component):
    model = make_model(component, dtype=dtype)

    def loss(params):
      logits = model.apply({"params": params}, TOKENS, POSITIONS, SEGMENTS)
      return helpers.cross_entropy(logits, TOKENS, SEGMENTS > 0)

    return helpers.fit(loss, params)[1]

  helpers.assert_trains_alike(losses("posrf"), losses(None))


@pytest.mark.parametrize(
  ("component", "kwargs"),
  [
    ("posrf", {}),
    ("oprf", {"statistics": "constant"}),
    ("elu1", {}),
    ("trigrf", {}),
  ],
)
@pytest.mark.quick_every(4)
def test_packed_rows_are_separate_rows(params, component, kwargs):
  model = make_model(component, **kwargs)
  out = apply_packed(model, params)(TOKENS)
  assert jnp.isfinite(out).all()
  one = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
  for row, text in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]:
    here = np.flatnonzero(SEGMENTS[row] == text)
    alone = jnp.zeros((1, LENGTH), int)
    alone = alone.at[0, : len(here)].set(TOKENS[row, here])
    np.testing.assert_allclose(
      out[row, here], one(alone)[0, : len(here)], atol=2e-5
    )


def test_nothing_leaks(params):
  logits = apply_packed(make_model(), params)
  # The second text of the first row has other words: its neighbours, before
  # and behind it, do not notice.
  other = helpers.with_other_word(TOKENS, 0, slice(4, 7))
  helpers.assert_blind(logits, TOKENS, other, SEGMENTS != 2)
  # A token moves the logits of those after it; its own come from those before.
  other = helpers.with_other_word(TOKENS, 1, 8)
  early = jnp.arange(LENGTH)[None] <= jnp.array([LENGTH, 8, LENGTH])[:, None]
  helpers.assert_blind(logits, TOKENS, other, early)


@pytest.mark.parametrize("component", ["posrf", "cosformer", "elu1"])
@pytest.mark.quick_every(3)
def test_decoding_is_teacher_forcing(params, component):
  model = make_model(component)
  tokens = TOKENS[1:2]
  forced = model.apply({"params": params}, tokens)
  decoder = make_model(component, decode=True)
  cache = jax.jit(decoder.init)(jax.random.key(0), tokens)["cache"]

  @jax.jit
  def step(cache, token):
    out, new = decoder.apply(
      {"params": params, "cache": cache}, token[:, None], mutable=["cache"]
    )
    return new["cache"], out[:, 0]

  _, out = jax.lax.scan(step, cache, helpers.shift_right(tokens).T)
  np.testing.assert_allclose(out[:, 0], forced[0], atol=2e-5)
