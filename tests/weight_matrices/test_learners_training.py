"""Learners inside a model: trained by the optimiser, saved, restored."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import spectraformer_jax as sf
from spectraformer_jax.train.step.optim import decay_mask
from tests.weight_matrices.helpers import LEARNERS, quick_jit

TOKENS = jax.random.randint(jax.random.key(0), (4, 6), 0, 8)
LENGTH = jnp.array([6, 3, 1, 5])
LABELS = jnp.array([0, 1, 2, 1])


@functools.cache
def train_model(name):
  """A model, its variables at the start, and after a few optimiser steps."""
  # Rows are no multiple of the padded block, columns no power of two.
  fm = sf.feature_map("posrf", name, num_features=9)
  model = sf.nn.Classifier(
    vocab_size=8,
    num_classes=3,
    max_len=6,
    embed_dim=8,
    num_layers=1,
    head_dim=3,
    mlp_dim=8,
    dropout_rate=0.0,
    feature_map=fm,
  )
  start = init_model(model, 1)
  tx = optax.adamw(1e-2, weight_decay=0.1, mask=decay_mask)

  def loss(params, features):
    logits = model.apply(
      {"params": params, "random_features": features}, TOKENS, LENGTH
    )
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, LABELS
    ).mean()

  @quick_jit
  def step(params, state, features):
    grads = jax.grad(loss)(params, features)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, features = start["params"], start["random_features"]
  state = tx.init(params)
  # Three: a learnt context waits for two layers that start at zero.
  for _ in range(3):
    params, state = step(params, state, features)
  return model, start, {"params": params, "random_features": features}


def init_model(model, seed):
  rngs = {
    "params": jax.random.key(seed),
    "features": jax.random.key(seed + 100),
  }
  return quick_jit(model.init)(rngs, TOKENS, LENGTH)


def learnable(variables):
  """The feature map's leaves in the params of a model, by path."""
  params = variables["params"]["encoder"]["layer_0"]["attention"]["feature_map"]
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.quick_every(8)
def test_optimiser_moves_every_learnable_leaf(name):
  _, start, end = train_model(name)
  old, new = learnable(start), learnable(end)
  assert old
  for path in old:
    assert jnp.isfinite(new[path]).all(), path
    # Adam's first steps are of about the learning rate, 1e-2.
    assert jnp.abs(new[path] - old[path]).max() > 1e-3, path


@pytest.mark.parametrize("name", LEARNERS)
def test_weight_decay_leaves_learnable_leaves_alone(name):
  _, start, _ = train_model(name)
  mask = decay_mask(start["params"])
  assert not any(learnable({"params": mask}).values())
  assert mask["encoder"]["layer_0"]["attention"]["query"]["kernel"]


def assert_restored(model, restored, saved):
  for path, leaf in jax.tree_util.tree_leaves_with_path(saved):
    other = restored
    for part in path:
      other = other[part.key]
    assert other.dtype == leaf.dtype
    np.testing.assert_array_equal(other, leaf)
  apply = quick_jit(model.apply)
  np.testing.assert_array_equal(
    apply(restored, TOKENS, LENGTH), apply(saved, TOKENS, LENGTH)
  )


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.quick_every(8)
def test_a_saved_model_is_restored_exactly(name):
  model, start, end = train_model(name)
  # The model that reads has other parameters, permutations and signs.
  other = init_model(model, 2)
  for leaf, own in zip(
    jax.tree.leaves(other["random_features"]),
    jax.tree.leaves(start["random_features"]),
    strict=True,
  ):
    assert leaf.shape == own.shape and not jnp.array_equal(leaf, own)
  restored = flax.serialization.from_bytes(
    other, flax.serialization.to_bytes(end)
  )
  assert_restored(model, restored, end)


@pytest.mark.parametrize("name", ["fastfood_learnable", "gmm", "learned_orf"])
def test_orbax_restores_exactly(name, tmp_path):
  model, _, end = train_model(name)
  other = init_model(model, 2)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "model", end)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "model", other)
  assert_restored(model, restored, end)


def test_outputs_depend_on_the_permutation():
  # The point of saving it: parameters alone do not restore the model.
  model, _, end = train_model("fastfood_learnable")
  other = init_model(model, 2)
  mixed = {**end, "random_features": other["random_features"]}
  apply = quick_jit(model.apply)
  out, expected = (
    apply(variables, TOKENS, LENGTH) for variables in (mixed, end)
  )
  assert not np.allclose(out, expected, atol=1e-6)
