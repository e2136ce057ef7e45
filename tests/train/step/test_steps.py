import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spectraformer_jax.nn.sequence_encoder import BatchNorm
from spectraformer_jax.train.step import state, steps
from tests.train import workers
from tests.train.helpers import run_python

# Devices and engine; the first is what the others are compared with.
RUNS = ((1, "pmap"), (8, "pmap"), (8, "jit"))


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
  """What the same steps give on other devices: `on_devices(8, "jit")`."""

  @functools.cache
  def run(devices, engine):
    path = tmp_path_factory.mktemp("steps") / "arrays.npz"
    code, _, err = run_python(
      "-m",
      "tests.train.workers",
      "steps",
      str(path),
      engine,
      devices=devices,
    )
    assert code == 0, err
    return dict(np.load(path))

  return run


@pytest.mark.parametrize("engine", ["pmap", "jit"])
@pytest.mark.slow
def test_one_and_eight_devices_agree(engine, on_devices):
  one, eight = on_devices(*RUNS[0]), on_devices(8, engine)
  assert one.keys() == eight.keys()
  for name in one:
    if name.endswith("all_reduces") or name == "others":
      continue
    # Only the order of float32 sums differs: some units of 1e-7 relative to the
    # largest entry; five steps of Adam at lr 1e-3 add up to the same order.
    tolerance = 3e-6 * max(1e-3, np.abs(one[name]).max())
    if name.startswith("params"):
      tolerance = 2e-6
    np.testing.assert_allclose(
      one[name], eight[name], rtol=0, atol=tolerance, err_msg=name
    )


@pytest.mark.parametrize("engine", ["pmap", "jit"])
@pytest.mark.slow
def test_one_all_reduce_a_step(engine, on_devices):
  eight = on_devices(8, engine)
  assert eight["all_reduces"] == 1 and eight["others"] == 0
  assert eight["ema_all_reduces"] == 1


@pytest.mark.parametrize("engine", ["pmap", "jit"])
@pytest.mark.slow
def test_running_statistics_are_averaged_over_devices(engine, on_devices):
  """Eight replicas of two examples each, one after the other on one device."""
  model = workers.tiny_model(feature_map=workers.EMA_MAP)
  train_state = state.create(
    model, workers.EMA_MAP, optax.sgd(0.0), state.run_keys(0)
  )
  update = jax.jit(
    lambda batch: steps.gradients(
      train_state, batch, jax.random.key(1), apply_fn=model.apply
    )[2]
  )
  batch = workers.tiny_batch(0)
  replicas = [
    workers.named(
      "ema",
      update({name: x[2 * i : 2 * i + 2] for name, x in batch.items()})[
        state.MUTABLE_COLLECTION
      ],
    )
    for i in range(8)
  ]
  eight = on_devices(8, engine)
  for name in replicas[0]:
    each = np.stack([replica[name] for replica in replicas])
    np.testing.assert_allclose(eight[name], each.mean(0), rtol=1e-6, atol=1e-7)
  # Without the average the first replica's statistics would be the result.
  assert any(
    np.abs(replicas[0][name] - eight[name]).max() > 1e-3
    for name in eight
    if name.startswith("ema[")
  )


@pytest.mark.parametrize("engine", ["pmap", "jit"])
@pytest.mark.parametrize("devices", [8, 16])  # two examples on each, one
@pytest.mark.slow
def test_batch_norm_is_that_of_the_whole_batch(devices, engine, tmp_path):
  found = []
  for count in (1, devices):
    path = tmp_path / f"{count}.npz"
    code, _, err = run_python(
      "-m", "tests.train.workers", "norm", str(path), engine, devices=count
    )
    assert code == 0, err
    found.append(dict(np.load(path)))
  one, many = found
  assert one.keys() == many.keys()
  encoder = [x for x in one if x.startswith("gradient['encoder']")]
  assert max(np.abs(one[name]).max() for name in encoder) > 1e-3
  for name in one:
    # float32 sums in another order, of gradients that were parameters' changes.
    tolerance = 1e-5 * max(0.1, np.abs(one[name]).max())
    np.testing.assert_allclose(
      one[name], many[name], rtol=0, atol=tolerance, err_msg=name
    )


@pytest.mark.parametrize("parts", [8, 2])  # one example on each, four
@pytest.mark.quick_every(2)
def test_moments_and_gradient_of_divided_batch_norm(parts):
  x, y = np.random.default_rng(0).standard_normal((2, 8, 3), np.float32)
  variables = BatchNorm().init(jax.random.key(0), x)

  def loss(x, y, axis_name):
    layer = BatchNorm(axis_name)
    out, updated = layer.apply(
      variables, x, deterministic=False, mutable=["feature_stats"]
    )
    return jnp.sum(jnp.sin(out) * y), updated

  grad = jax.grad(loss, has_aux=True)
  expected = grad(x, y, None)
  assert np.abs(expected[0]).max() > 0.1
  divide = lambda array: array.reshape(parts, -1, 3)
  found = jax.vmap(lambda x, y: grad(x, y, "data"), axis_name="data")(
    divide(x), divide(y)
  )
  # float32 sums of eight numbers of order 1.
  np.testing.assert_allclose(
    found[0].reshape(8, 3), expected[0], rtol=0, atol=2e-6
  )
  moments = map(jax.tree.leaves, (found[1], expected[1]))
  for many, one in zip(*moments, strict=True):
    for copy in many:
      np.testing.assert_allclose(copy, one, rtol=1e-6, atol=1e-7)


def test_batch_norm_of_one_example_is_refused():
  model = workers.tiny_model().clone(pooled_norm="batch")
  batch = {name: array[:1] for name, array in workers.tiny_batch().items()}
  train_state = state.create(
    model, workers.MAP, optax.sgd(1.0), state.run_keys(0)
  )
  step = functools.partial(
    steps.train_step, apply_fn=model.apply, tx=optax.sgd(1.0)
  )
  with pytest.raises(ValueError, match="at least 2 examples .* got 1"):
    jax.eval_shape(step, train_state, batch, jax.random.key(0))
  # In evaluation one is enough.
  evaluate = functools.partial(steps.eval_step, apply_fn=model.apply)
  jax.eval_shape(evaluate, train_state, batch)


@pytest.mark.slow
def test_gradient_is_that_of_the_weighted_mean(on_devices):
  model, batch = workers.tiny_model(), workers.tiny_batch(0)
  train_state = state.create(
    model, workers.MAP, optax.sgd(1.0), state.run_keys(0)
  )

  def weighted_mean_loss(params):
    logits = model.apply(
      {"params": params, **train_state.collections},
      batch["tokens"],
      batch["length"],
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    return jnp.sum(loss * batch["weight"]) / jnp.sum(batch["weight"])

  expected = jax.jit(jax.grad(weighted_mean_loss))(train_state.params)
  for name, gradient in workers.named("gradient", expected).items():
    scale = max(1e-3, np.abs(gradient).max())
    for run in RUNS:
      # float32: parameters of order 1 were subtracted to get the gradient.
      np.testing.assert_allclose(
        on_devices(*run)[name], gradient, rtol=0, atol=1e-6 + 1e-5 * scale
      )


@pytest.mark.slow
def test_dropout_differs_by_replica_and_projections_do_not():
  code, out, err = run_python("-m", "tests.train.workers", "keys", devices=8)
  assert code == 0, err
  facts = json.loads(out)
  assert facts["devices"] == facts["copies"] == 8
  assert facts["distinct_keys"] == 9  # eight replicas, and the next step's
  assert facts["distinct_copies"] == 1
  assert facts["same_interval_same_draw"]
  assert not facts["next_interval_same_draw"]


@pytest.mark.slow
def test_dropout_is_on_in_training_and_off_in_evaluation():
  model = workers.tiny_model(dropout_rate=0.5)
  train_state = state.create(
    model, workers.MAP, optax.sgd(0.0), state.run_keys(0)
  )
  batch = workers.tiny_batch()
  step = jax.jit(
    functools.partial(steps.train_step, apply_fn=model.apply, tx=optax.sgd(0.0))
  )
  train = lambda seed: step(train_state, batch, jax.random.key(seed))[1].loss
  assert train(0) == train(0) != train(1)
  evaluate = jax.jit(functools.partial(steps.eval_step, apply_fn=model.apply))
  loss = evaluate(train_state, batch).loss
  assert loss not in (train(0), train(1))
  without = workers.tiny_model(dropout_rate=0.0)
  np.testing.assert_allclose(
    loss,
    steps.eval_step(train_state, batch, apply_fn=without.apply).loss,
    rtol=1e-6,  # eager and compiled float32
  )


@pytest.mark.slow
def test_batch_without_weight_changes_nothing():
  model, batch = workers.tiny_model(), workers.tiny_batch()
  batch["weight"] = np.zeros_like(batch["weight"])
  tx = optax.sgd(1.0)
  train_state = state.create(model, workers.MAP, tx, state.run_keys(0))
  after, sums = steps.train_step(
    train_state, batch, jax.random.key(0), apply_fn=model.apply, tx=tx
  )
  assert sums.weight == 0 and after.step == 1
  for old, new in zip(
    jax.tree.leaves(train_state.params),
    jax.tree.leaves(after.params),
    strict=True,
  ):
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.slow
def test_one_replica_that_is_not_finite_stops_all(bad):
  model, tx = workers.tiny_model(), optax.adam(1.0)
  train_state = state.create(model, workers.MAP, tx, state.run_keys(0))
  batch = workers.tiny_batch()
  split = {n: a.reshape(4, -1, *a.shape[1:]) for n, a in batch.items()}

  @jax.jit
  def step(weight):
    one = lambda shard: steps.train_step(
      train_state,
      shard,
      jax.random.key(0),
      apply_fn=model.apply,
      tx=tx,
      axis_name="data",
    )
    return jax.vmap(one, axis_name="data")(split | {"weight": weight})

  changed = lambda after: {
    name
    for name, old in workers.named("", train_state).items()
    if not np.array_equal(workers.named("", after)[name], np.stack([old] * 4))
  }
  after, sums = step(split["weight"])
  assert np.all(sums.skipped == 0) and np.all(sums.weight > 0)
  assert any("mu" in name for name in changed(after))
  split["weight"][2, 1] = bad
  after, sums = step(split["weight"])
  assert np.all(sums.skipped == 1) and np.all(sums.loss == 0)
  assert changed(after) == {".step"} and np.all(after.step == 1)


@pytest.mark.slow
def test_running_statistics_are_carried_and_averaged():
  # A model whose "feature_stats" become the mean token of the batch.
  def apply_fn(variables, tokens, length, **kwargs):
    logits = variables["params"]["w"][tokens[:, 0]]
    if not kwargs.get("mutable"):
      return logits
    return logits, {"feature_stats": {"mean": jnp.mean(tokens * 1.0)}}

  batch = workers.tiny_batch()
  tx = optax.sgd(1.0)
  params = {"w": jnp.zeros((16, 4))}
  train_state = state.TrainState(
    jnp.int32(0), params, {"feature_stats": {"mean": 0.0}}, tx.init(params)
  )
  split = {n: a.reshape(4, -1, *a.shape[1:]) for n, a in batch.items()}
  step = lambda shard: (
    steps.train_step(
      train_state,
      shard,
      jax.random.key(0),
      apply_fn=apply_fn,
      tx=tx,
      axis_name="data",
    )[0].collections
  )
  means = jax.vmap(step, axis_name="data")(split)["feature_stats"]["mean"]
  # Sums of 192 small integers: exact up to the last place of the mean.
  np.testing.assert_allclose(means, np.mean(batch["tokens"]), rtol=1e-6)
