"""Runs in processes of their own: `python -m tests.train.workers NAME ...`.

They are started with another number of virtual devices than the tests have.
"""

import functools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spectraformer_jax import nn
from spectraformer_jax.feature_maps.compose import feature_map
from spectraformer_jax.train import config as train_config
from spectraformer_jax.train import loop
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.step import optim, state, steps

BATCH, LENGTH = 16, 12
ALL_REDUCE = r" all-reduce(-start)?\("
OTHER_COLLECTIVES = (
  r" (all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
MAP = feature_map("oprf", "orf", num_features=8)
EMA_MAP = feature_map(
  "oprf", "orf", num_features=8, component_kwargs={"statistics": "ema"}
)


def tiny_model(dropout_rate: float = 0.0, feature_map=MAP) -> nn.Classifier:
  return nn.Classifier(
    vocab_size=16,
    num_classes=4,
    max_len=LENGTH,
    embed_dim=8,
    num_layers=2,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    dropout_rate=dropout_rate,
    feature_map=feature_map,
  )


def tiny_batch(seed: int = 0) -> dict[str, np.ndarray]:
  """Padding and weights are uneven, so that shards differ in both."""
  rng = np.random.default_rng(seed)
  weight = rng.uniform(0, 2, BATCH).astype(np.float32)
  weight[:3] = 0  # the first of eight replicas has no weight at all
  return {
    "tokens": rng.integers(0, 16, (BATCH, LENGTH)).astype(np.uint8),
    "length": rng.integers(1, LENGTH + 1, BATCH).astype(np.int32),
    "label": rng.integers(0, 4, BATCH).astype(np.int32),
    "weight": weight,
  }


def train_steps(tx, num_steps: int, engine: str, feature_map=MAP):
  """State and sums after that many steps on all local devices."""
  model = tiny_model(feature_map=feature_map)
  train_state = state.create(model, feature_map, tx, state.run_keys(0))
  step = parallel.DataParallelStep(
    functools.partial(steps.train_step, apply_fn=model.apply, tx=tx),
    engine=engine,
  )
  train_state = parallel.replicate(train_state)
  for seed in range(num_steps):
    train_state, sums = step(train_state, tiny_batch(seed), jax.random.key(1))
  (compiled,) = step._compiled.values()
  return train_state, sums, compiled.as_text()


def run_steps(path: str, engine: str) -> None:
  """Saves what training does on this many devices."""
  # Programs as users have them: tolerances are those of their sums.
  jax.config.update("jax_disable_most_optimizations", False)
  arrays = {}
  # With lr 1 and no clipping the change of the parameters is the gradient.
  before = state.create(tiny_model(), MAP, optax.sgd(1.0), state.run_keys(0))
  after, sums, text = train_steps(optax.sgd(1.0), 1, engine)
  arrays["all_reduces"] = len(re.findall(ALL_REDUCE, text))
  arrays["others"] = len(re.findall(OTHER_COLLECTIVES, text))
  arrays |= named("sums", sums)
  arrays |= named(
    "gradient",
    jax.tree.map(lambda a, b: np.asarray(a) - b, before.params, after.params),
  )
  ema, _, text = train_steps(optax.sgd(0.0), 1, engine, EMA_MAP)
  arrays["ema_all_reduces"] = len(re.findall(ALL_REDUCE, text))
  arrays |= named("ema", ema.collections[state.MUTABLE_COLLECTION])
  config = train_config.default_config().optim
  config.update(lr=1e-3, warmup_steps=2)
  adam, sums, _ = train_steps(optim.make_optimizer(config, 20), 5, engine)
  arrays |= named("params", adam.params)
  model = tiny_model()
  evaluate = parallel.DataParallelStep(
    functools.partial(steps.eval_step, apply_fn=model.apply), engine=engine
  )
  arrays |= named("eval", evaluate(adam, tiny_batch(9)))
  np.savez(path, **arrays)


def run_norm(path: str, engine: str) -> None:
  """Saves gradient and moments of a model with batch normalisation."""
  jax.config.update("jax_disable_most_optimizations", False)
  model = tiny_model().clone(pooled_norm="batch", batch_axis=parallel.AXIS)
  tx = optax.sgd(1.0)
  before = state.create(model, MAP, tx, state.run_keys(0))
  step = parallel.DataParallelStep(
    functools.partial(steps.train_step, apply_fn=model.apply, tx=tx),
    engine=engine,
  )
  after, sums = step(
    parallel.replicate(before), tiny_batch(), jax.random.key(1)
  )
  change = jax.tree.map(
    lambda a, b: np.asarray(a) - b, before.params, after.params
  )
  np.savez(
    path,
    **named("gradient", change),
    **named("sums", sums),
    **named("moments", after.collections[state.MUTABLE_COLLECTION]),
  )


def run_keys() -> None:
  """Checks keys and projections of replicas on this many devices."""
  devices = jax.local_device_count()
  keys = jax.pmap(
    lambda step: jax.random.key_data(
      steps.replica_rng(jax.random.key(0), step, "replicas")
    ),
    axis_name="replicas",
  )(jnp.full(devices, 3))
  next_keys = jax.random.key_data(steps.replica_rng(jax.random.key(0), 4, None))
  distinct = {tuple(key) for key in [*np.asarray(keys), np.asarray(next_keys)]}

  tx = optax.sgd(1.0)
  train_state = parallel.replicate(
    state.create(tiny_model(), MAP, tx, state.run_keys(0))
  )
  redraw = parallel.on_one_device(
    functools.partial(
      steps.redraw_step,
      redraw_fn=functools.partial(nn.redraw, MAP),
      interval=5,
    )
  )
  rng = jax.random.key(7)
  at = lambda step: redraw(
    train_state._replace(step=parallel.replicate(jnp.int32(step))), rng
  ).collections["random_features"]
  first, same, second = at(5), at(9), at(10)
  equal = lambda a, b: jax.tree.all(
    jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b)
  )
  shards = jax.tree.leaves(second)[0].addressable_shards
  print(
    json.dumps(
      {
        "devices": devices,
        "distinct_keys": len(distinct),
        "copies": len(shards),
        "distinct_copies": len({np.asarray(s.data).tobytes() for s in shards}),
        "same_interval_same_draw": equal(first, same),
        "next_interval_same_draw": equal(first, second),
      }
    )
  )


def run_training(config_path: str, workdir: str, stop_at: str) -> None:
  """Trains; stops without a word before that training step unless it is 0."""
  config = train_config.default_config()
  config.update(json.loads(Path(config_path).read_text()))
  if int(stop_at):
    parallel.DataParallelStep.__call__ = stopping(int(stop_at))
  try:
    loop.train_and_evaluate(config, workdir)
  except KeyboardInterrupt:
    pass


def stopping(at_call: int):
  """A `DataParallelStep.__call__` whose n-th training step never happens."""
  original = parallel.DataParallelStep.__call__
  calls = 0

  def call(self, train_state, batch, *rest):
    nonlocal calls
    if rest:  # only the training step takes a key
      calls += 1
      if calls == at_call:
        raise KeyboardInterrupt
    return original(self, train_state, batch, *rest)

  return call


def before_step(at_call: int, action):
  """A `DataParallelStep.__call__` with `action(batch)` before its n-th step."""
  original = parallel.DataParallelStep.__call__
  calls = 0

  def call(self, train_state, batch, *rest):
    nonlocal calls
    if rest:  # only the training step takes a key
      calls += 1
      if calls == at_call:
        action(batch)
    return original(self, train_state, batch, *rest)

  return call


def named(prefix, tree) -> dict[str, np.ndarray]:
  """Leaves of a tree by path, for np.savez."""
  return {
    f"{prefix}{jax.tree_util.keystr(path)}": np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


if __name__ == "__main__":
  name, *args = sys.argv[1:]
  runs = {"steps": run_steps, "norm": run_norm, "keys": run_keys}
  (runs | {"training": run_training})[name](*args)
