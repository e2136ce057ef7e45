"""Flax's own transformations of the modules, as clients write them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf

OPTIONS = {
  "num_heads": 2,
  "head_dim": 4,
  "mlp_dim": 8,
  "is_causal": True,
  "feature_map": sf.feature_map("posrf", "orf", num_features=8),
}
X = jax.random.normal(jax.random.key(0), (2, 6, 8))


class Block(nn.Module):
  """One layer, in the form that `nn.scan` wants."""

  decode: bool = False
  deterministic: bool = True

  @nn.compact
  def __call__(self, x, _):
    layer = sf.nn.EncoderLayer(**OPTIONS)
    flags = {"decode": self.decode, "deterministic": self.deterministic}
    return layer(x, **flags), None


def make_stack(
  block=Block, collections=("params", "random_features"), **kwargs
):
  return nn.scan(
    block,
    variable_axes=dict.fromkeys(collections, 0),
    split_rngs={"params": True, "features": True, "dropout": True},
    length=3,
  )(**kwargs)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.quick_every(2)
def test_scanned_layers_are_those_in_a_row(again):
  """With nn.remat inside of nn.scan as well: values and gradients."""
  block = nn.remat(Block, prevent_cse=False) if again else Block
  scanned = make_stack(block)
  variables = jax.jit(scanned.init)(jax.random.key(1), X, None)
  (rows,) = jax.tree.leaves(variables["random_features"])
  assert rows.shape == (3, 2, 8, 4)
  assert np.abs(rows[0] - rows[1]).max() > 0.1

  def in_a_row(variables, x):
    for layer in range(3):
      own = jax.tree.map(lambda leaf, i=layer: leaf[i], variables)
      x, _ = Block().apply(own, x, None)
    return x

  def value_and_grad(apply):
    loss = lambda params, x: jnp.sum(
      jnp.sin(apply({**variables, "params": params}, x))
    )
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(variables["params"], X)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5),
    value_and_grad(lambda variables, x: scanned.apply(variables, x, None)[0]),
    value_and_grad(in_a_row),
  )


@pytest.mark.slow
def test_scanned_layers_decode():
  variables = jax.jit(make_stack().init)(jax.random.key(1), X, None)
  whole, _ = make_stack().apply(variables, X, None)
  decoder = make_stack(
    collections=("params", "random_features", "cache"), decode=True
  )
  cache, parts = {}, []
  for start, stop in ((0, 4), (4, 6)):
    (out, _), cache = decoder.apply(
      {**variables, **cache}, X[:, start:stop], None, mutable=["cache"]
    )
    parts.append(out)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def test_a_collection_that_is_left_out_is_named():
  words = "'random_features' is missing: .* variable_axes="
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(
      make_stack(collections=("params",)).init, jax.random.key(1), X, None
    )
  layer = sf.nn.EncoderLayer(**OPTIONS)
  variables = jax.eval_shape(layer.init, jax.random.key(1), X)
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(layer.apply, {"params": variables["params"]}, X)


def test_remat_of_a_function_and_not_of_flags():
  layer = sf.nn.EncoderLayer(**OPTIONS)
  variables = layer.init(jax.random.key(1), X)
  rngs = {"dropout": jax.random.key(2)}

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = sf.nn.EncoderLayer(**OPTIONS)
      nn.share_scope(self, layer)
      run = nn.remat(lambda layer, x: layer(x, deterministic=False))
      return run(layer, x)

  def value_and_grad(module, **kwargs):
    loss = lambda params: jnp.sum(
      module.apply({**variables, "params": params}, X, rngs=rngs, **kwargs) ** 2
    )
    return jax.jit(jax.value_and_grad(loss))(variables["params"])

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    value_and_grad(Model()),
    value_and_grad(layer, deterministic=False),
  )
  with pytest.raises(ValueError, match="deterministic must be a Python bool"):
    nn.remat(sf.nn.EncoderLayer)(**OPTIONS).apply(
      variables, X, deterministic=False, rngs=rngs
    )


@pytest.mark.slow
def test_vmapped_layers():
  x = jnp.stack([X, 2 * X, 3 * X])
  axes = {"params": 0, "random_features": 0}
  rngs = {"params": True, "features": True}
  layers = nn.vmap(
    sf.nn.EncoderLayer, variable_axes=axes, split_rngs=rngs, axis_size=3
  )(**OPTIONS)
  variables = layers.init(jax.random.key(1), x)
  out = layers.apply(variables, x)
  for i in range(3):
    own = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
    alone = sf.nn.EncoderLayer(**OPTIONS).apply(own, x[i])
    np.testing.assert_allclose(out[i], alone, atol=1e-5)
