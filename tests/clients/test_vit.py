"""An image transformer in the style of big_vision's ViT: scan, remat, pooling.

Blocks are one module, repeated by `nn.scan` and recomputed by `nn.remat`. The
adapter's projection is a constant that all blocks share; with a module of this
library each block has its own, in the collection "random_features".
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spectraformer_jax as sf
from tests.clients import helpers

DEPTH, CLASSES = 2, 3


class Block(nn.Module):
  """Self-attention and a perceptron, each normalised before."""

  attention_fn: Callable
  is_own_module: bool = False

  @nn.compact
  def __call__(self, x, deterministic=True):
    y = nn.LayerNorm()(x)
    if self.is_own_module:
      y = sf.nn.SpectralSelfAttention(
        num_heads=helpers.HEADS,
        head_dim=helpers.HEAD_DIM,
        feature_map=sf.feature_map("oprf", "orf", num_features=64),
      )(y)
    else:
      y = nn.MultiHeadDotProductAttention(
        num_heads=helpers.HEADS,
        kernel_init=nn.initializers.xavier_uniform(),
        deterministic=deterministic,
        attention_fn=self.attention_fn,
      )(y, y)
    x = x + nn.Dropout(0.0)(y, deterministic)
    y = nn.Dense(2 * helpers.WIDTH)(nn.LayerNorm()(x))
    x = x + nn.Dense(helpers.WIDTH)(nn.gelu(y))
    return x, {"after": x}


class MapHead(nn.Module):
  """One learned query looks at all patches."""

  attention_fn: Callable

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.xavier_uniform()
    probe = self.param("probe", init, (1, 1, x.shape[-1]))
    probe = jnp.tile(probe, [len(x), 1, 1])
    return nn.MultiHeadDotProductAttention(
      num_heads=helpers.HEADS, attention_fn=self.attention_fn
    )(probe, x)[:, 0]


class Vit(nn.Module):
  """Logits of an image."""

  attention_fn: Callable = nn.dot_product_attention
  is_own_module: bool = False
  pool: str = "gap"
  scan: bool = True

  @nn.compact
  def __call__(self, image, train=False):
    x = nn.Conv(helpers.WIDTH, (4, 4), strides=(4, 4), padding="VALID")(image)
    x = x.reshape(len(x), -1, helpers.WIDTH)
    init = nn.initializers.normal(0.25)
    x = x + self.param("positions", init, (1, *x.shape[1:]))
    if self.pool == "tok":
      cls = self.param("cls", nn.initializers.zeros, (1, 1, helpers.WIDTH))
      x = jnp.concatenate([jnp.tile(cls, [len(x), 1, 1]), x], axis=1)
    kwargs = {
      "attention_fn": self.attention_fn,
      "is_own_module": self.is_own_module,
    }
    if self.scan:
      block = nn.remat(
        Block,
        prevent_cse=False,
        static_argnums=(2,),
        policy=jax.checkpoint_policies.nothing_saveable,
      )
      axes, rngs = {"params": 0}, {"params": True, "dropout": True}
      if self.is_own_module:
        axes, rngs = axes | {"random_features": 0}, rngs | {"features": True}
      x, _ = nn.scan(
        block,
        variable_axes=axes,
        split_rngs=rngs,
        in_axes=nn.broadcast,
        length=DEPTH,
      )(**kwargs, name="blocks")(x, not train)
    else:
      for index in range(DEPTH):
        x, _ = Block(**kwargs, name=f"block_{index}")(x, not train)
    x = nn.LayerNorm()(x)
    if self.pool == "map":
      x = MapHead(self.attention_fn)(x)
    else:
      x = x[:, 0] if self.pool == "tok" else x.mean(axis=1)
    return nn.Dense(CLASSES)(x)


LABELS = jnp.arange(12) % CLASSES
IMAGES = (
  jax.random.normal(jax.random.key(1), (12, 16, 16, 1))
  + 2 * jax.random.normal(jax.random.key(2), (CLASSES, 16, 16, 1))[LABELS]
)


def make_model(component="oprf", **kwargs):
  """Makes the model, with softmax if `component` is None."""
  if component is None:
    return Vit(**kwargs)
  return Vit(sf.as_attention_fn(*helpers.make_map(component)), **kwargs)


def init_model(model):
  """Draws the variables, with one key for each collection."""
  return jax.jit(model.init)(
    {"params": jax.random.key(0), "features": jax.random.key(1)}, IMAGES
  )


def train_model(model, variables, tx=None):
  """Optimises all variables; returns them and the losses."""

  def loss(variables):
    logits = model.apply(variables, IMAGES, train=True)
    return helpers.cross_entropy(logits, LABELS, jnp.ones(len(LABELS)))

  return helpers.fit(loss, variables, tx)


@pytest.mark.parametrize("pool", ["gap", "tok", "map"])
@pytest.mark.quick_every(3)
def test_trains_as_with_softmax(pool):
  original = make_model(None, pool=pool)
  variables = init_model(original)
  _, losses = train_model(make_model(pool=pool), variables)
  helpers.assert_trains_alike(losses, train_model(original, variables)[1])


def test_scanned_blocks_are_blocks():
  model = make_model()
  variables = init_model(model)
  params = dict(variables["params"])
  stacked = params.pop("blocks")
  for index in range(DEPTH):
    params[f"block_{index}"] = jax.tree.map(lambda x, i=index: x[i], stacked)
  unrolled = jax.jit(make_model(scan=False).apply)({"params": params}, IMAGES)
  np.testing.assert_allclose(
    jax.jit(model.apply)(variables, IMAGES), unrolled, atol=2e-5
  )


def test_images_of_a_batch_are_apart():
  """Statistics of an oprf are those of each image."""
  model = make_model()
  variables = init_model(model)
  logits = jax.jit(lambda images: model.apply(variables, images))
  other = IMAGES.at[3].mul(-3)
  helpers.assert_blind(logits, IMAGES, other, jnp.arange(len(IMAGES)) != 3)


@pytest.mark.slow
def test_weight_decay_leaves_the_projection():
  """With this library's module every block has a projection of its own."""
  model = make_model(None, is_own_module=True)
  variables = init_model(model)
  (drawn,) = jax.tree.leaves(variables["random_features"])
  assert len(drawn) == DEPTH and not np.allclose(drawn[0], drawn[1])
  decay = optax.masked(optax.adamw(1e-2, weight_decay=0.1), sf.trainable)
  after, losses = train_model(model, variables, decay)
  assert losses[-1] < 0.5 * losses[0]
  (kept,) = jax.tree.leaves(after["random_features"])
  np.testing.assert_array_equal(drawn, kept)
