"""The mask of leaves that an optimiser may update."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spectraformer_jax as sf

FM = sf.feature_map("posrf", "gmm", num_features=8)
X = jax.random.normal(jax.random.key(0), (2, 6, 1, 4))


def loss(variables, dense):
  """Computes a loss of attention on random inputs and a dense layer."""
  kwargs = {"feature_map": FM, "variables": variables}
  out = sf.spectral_attention(X, X, X, **kwargs)
  return jnp.mean(jnp.square(out * dense - 1.0))


def train(optimizer, steps=300):
  """Trains, and returns the variables before and after."""
  before = {
    "attention": FM.init(jax.random.key(1), head_dim=4),
    "dense": jnp.ones((1, 1, 1, 4)),
  }

  def step(carry, _):
    tree, state = carry
    grads = jax.grad(lambda t: loss(t["attention"], t["dense"]))(tree)
    updates, state = optimizer.update(grads, state, tree)
    return (optax.apply_updates(tree, updates), state), None

  carry = before, optimizer.init(before)
  (after, _), _ = jax.jit(
    lambda carry: jax.lax.scan(step, carry, None, length=steps)
  )(carry)
  return before, after


def size(variables):
  """Returns the norm of W."""
  return float(jnp.linalg.norm(variables["attention"].projection["rows"]["w"]))


def test_weight_decay_leaves_the_projection_as_it_was_drawn():
  adamw = optax.adamw(1e-2, weight_decay=0.1)
  before, after = train(adamw)
  assert size(after) < 0.8 * size(before), "the case decays what it can"
  for optimizer in (
    optax.masked(adamw, sf.trainable),
    optax.adamw(1e-2, weight_decay=0.1, mask=sf.trainable),
  ):
    before, after = train(optimizer)
    projection = [tree["attention"].projection for tree in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *projection)
    for tree in (
      (before["dense"], after["dense"]),
      *zip(
        jax.tree.leaves(before["attention"].params),
        jax.tree.leaves(after["attention"].params),
        strict=True,
      ),
    ):
      assert float(jnp.abs(tree[0] - tree[1]).max()) > 1e-3


def test_trees_of_all_kinds():
  variables = FM.init(jax.random.key(0), head_dim=4)
  wanted = FM.init(jax.random.key(0), head_dim=4)
  wanted = sf.FeatureVariables(
    jax.tree.map(lambda _: True, variables.params),
    jax.tree.map(lambda _: False, variables.projection),
  )
  assert sf.trainable(variables) == wanted
  as_dict = flax.serialization.to_state_dict(variables)
  assert sf.trainable(as_dict) == wanted._asdict()
  # A dense layer of that name is not a projection.
  tree = {"a": [variables, jnp.arange(3)], "projection": {"kernel": X}, "b": 1}
  mask = sf.trainable(tree)
  assert mask == {
    "a": [wanted, False],
    "projection": {"kernel": True},
    "b": False,
  }


def test_variables_of_our_modules():
  fm = sf.feature_map("oprf", "gmm", num_features=8)
  layer = sf.nn.SpectralSelfAttention(num_heads=1, head_dim=4, feature_map=fm)
  variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 4)))
  mask = sf.trainable(variables)
  assert all(jax.tree.leaves(mask["params"]))
  assert not any(jax.tree.leaves(mask["random_features"]))


def test_a_parameter_of_nnx_that_holds_all_variables():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.maps = nnx.Param(FM.init(rngs.params(), head_dim=4))
      self.dense = nnx.Param(jnp.ones((1, 1, 1, 4)))

  model = Model(nnx.Rngs(0))
  before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  adamw = optax.masked(optax.adamw(0.1, weight_decay=0.1), sf.trainable)
  optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param)
  grads = nnx.grad(lambda m: loss(m.maps.get_value(), m.dense.get_value()))(
    model
  )
  optimizer.update(model, grads)
  after = nnx.state(model, nnx.Param)
  moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
  moved = nnx.to_pure_dict(moved)
  assert not any(jax.tree.leaves(moved["maps"].projection))
  assert moved["dense"] and all(jax.tree.leaves(moved["maps"].params))


def test_partition_of_equinox():
  eqx = pytest.importorskip("equinox")
  tree = {"maps": FM.init(jax.random.key(0), head_dim=4), "act": jax.nn.relu}
  learnt, fixed = eqx.partition(tree, sf.trainable(tree))
  assert not jax.tree.leaves(learnt["maps"].projection)
  assert not jax.tree.leaves(fixed["maps"].params)
  assert fixed["act"] is jax.nn.relu


def test_public_names_are_listed():
  assert {"nn", "trainable"} <= set(dir(sf))
