import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spectraformer_jax import nn
from spectraformer_jax.feature_maps.compose import feature_map
from spectraformer_jax.train.config import default_config
from spectraformer_jax.train.step.optim import (
  decay_mask,
  learning_rate,
  make_optimizer,
)


def test_official_schedule_at_its_corners():
  schedule = learning_rate(default_config().optim, 50_000)
  # float32 interpolation of the schedule: a few units in the last place.
  close = {"rtol": 1e-5}
  np.testing.assert_allclose(schedule(0), 1e-4 / 25, **close)
  np.testing.assert_allclose(schedule(500), 1e-4 * (1 / 25 + 1) / 2, **close)
  np.testing.assert_allclose(schedule(1000), 1e-4, **close)
  np.testing.assert_allclose(schedule(25_500), 0.5e-4, rtol=1e-4)
  # (1 - 1) cancels: absolute error of a float32 near 1e-4.
  np.testing.assert_allclose(schedule(50_000), 4e-10, atol=1e-11)


def test_cosine_schedule_at_its_corners():
  optim = default_config().optim
  optim.schedule, optim.warmup_steps = "cosine", 10
  schedule = learning_rate(optim, 110)
  np.testing.assert_allclose(schedule(10), 1e-4, rtol=1e-5)
  np.testing.assert_allclose(schedule(60), 0.5e-4, rtol=1e-4)
  np.testing.assert_allclose(schedule(110), 4e-10, atol=1e-11)


@pytest.mark.parametrize("warmup", [1000, 8000])
def test_rsqrt_schedule_is_long_range_arenas(warmup):
  optim = default_config().optim
  optim.update(schedule="rsqrt", warmup_steps=warmup, lr=0.05 / warmup**0.5)
  schedule = learning_rate(optim, 5000)
  for step in (0, 1, 10, 999, 1000, 1001, 5000, 20_000):
    # "constant * linear_warmup * rsqrt_decay" with a constant of 0.05.
    expected = 0.05 * min(1, step / warmup) / max(step, warmup) ** 0.5
    # float32: a few units in the last place.
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-6)
    traced = jax.jit(schedule)(jnp.int32(step))
    np.testing.assert_allclose(traced, expected, rtol=1e-6)


def test_rsqrt_without_warmup_starts_at_lr():
  optim = default_config().optim
  optim.schedule, optim.warmup_steps = "rsqrt", 0
  schedule = learning_rate(optim, 100)
  rates = [float(schedule(step)) / optim.lr for step in (0, 1, 4, 100)]
  np.testing.assert_allclose(rates, [1, 1, 0.5, 0.1], rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_no_warmup_starts_at_lr(name):
  optim = default_config().optim
  optim.schedule, optim.warmup_steps = name, 0
  np.testing.assert_allclose(learning_rate(optim, 100)(0), 1e-4, rtol=1e-6)


def first_update(**changes):
  """The first update of AdamW-as-configured for gradients (3, -4)."""
  optim = default_config().optim
  optim.update(warmup_steps=0, lr=1.0, eps=1.0, **changes)
  tx = make_optimizer(optim, 100)
  params = {"w": jnp.zeros((2, 1))}
  grads = {"w": jnp.array([[3.0], [-4.0]])}
  updates, _ = tx.update(grads, tx.init(params), params)
  return updates["w"].ravel()


def test_clipping():
  # Adam's first step is -lr g / (|g| + eps), so with eps=1 it shows g.
  undo = lambda update: -update / (1 - jnp.abs(update))
  rtol = 1e-4  # of undoing the division in float32
  np.testing.assert_allclose(undo(first_update()), [1, -1], rtol=rtol)
  np.testing.assert_allclose(
    undo(first_update(clip="global_norm")), [0.6, -0.8], rtol=rtol
  )
  np.testing.assert_allclose(
    undo(first_update(clip="none")), [3, -4], rtol=rtol
  )
  np.testing.assert_allclose(
    undo(first_update(clip_threshold=2.0)), [2, -2], rtol=rtol
  )


def test_weight_decay_exempts_what_it_should(rng):
  model = nn.Classifier(
    vocab_size=8,
    num_classes=3,
    max_len=4,
    embed_dim=8,
    num_layers=1,
    num_heads=1,
    head_dim=4,
    mlp_dim=8,
    pooling="cls",
    feature_map=feature_map("oprf", "orf", num_features=4),
  )
  params = model.init(
    {"params": rng, "features": jax.random.key(1)},
    jnp.ones((1, 4), jnp.int32),
    jnp.array([4]),
  )["params"]
  params["encoder"]["layer_0"]["attention"]["feature_map"] = {
    "rows": jnp.ones((1, 4, 4))
  }
  mask = {
    jax.tree_util.keystr(path, simple=True, separator="/"): decays
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params))
  }
  exempt = {name for name, decays in mask.items() if not decays}
  assert "encoder/layer_0/attention/feature_map/rows" in exempt
  assert {"position_embedding", "cls_token"} <= exempt
  assert all(
    name.endswith(("bias", "scale")) or name in exempt for name in exempt
  )
  decayed = set(mask) - exempt
  assert "token_embedding/embedding" in decayed
  assert all(name.endswith(("kernel", "embedding")) for name in decayed)


def test_weight_decay_reaches_the_update():
  optim = default_config().optim
  optim.update(warmup_steps=0, lr=0.1, weight_decay=0.5)
  tx = make_optimizer(optim, 100)
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  new = optax.apply_updates(params, updates)
  np.testing.assert_allclose(new["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
  np.testing.assert_array_equal(new["bias"], 1.0)
