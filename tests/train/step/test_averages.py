"""Label smoothing, the average of parameters, early stopping, learners' lr."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging

from spectraformer_jax.feature_maps.compose import feature_map
from spectraformer_jax.train import loop
from spectraformer_jax.train.config import default_config
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.run.writers import read_rows
from spectraformer_jax.train.step import optim, state, steps
from tests.train import workers
from tests.train.helpers import same_arrays, saved_arrays, without_times


def test_label_smoothing_is_that_of_smoothed_labels(rng):
  logits = jax.random.normal(rng, (5, 4))
  label = jnp.array([0, 1, 2, 3, 0])
  weight = jnp.array([1.0, 2.0, 0.0, 0.5, 1.0])
  smooth = optax.smooth_labels(jax.nn.one_hot(label, 4), 0.1)
  expected = jnp.sum(optax.softmax_cross_entropy(logits, smooth) * weight)
  sums = steps.weighted_sums(logits, label, weight, 0.1)
  np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)  # float32
  plain = steps.weighted_sums(logits, label, weight)
  assert not np.allclose(plain.loss, sums.loss, rtol=1e-3)
  assert plain.correct == sums.correct and plain.weight == sums.weight


def table(variables, tokens, length, **kwargs):
  """The smallest model there is: logits [16, 4] by the first token."""
  logits = variables["params"]["w"][tokens[:, 0]]
  return (logits, {}) if kwargs.get("mutable") is not None else logits


def table_state(tx, ema=False):
  params = {"w": jax.random.normal(jax.random.key(0), (16, 4))}
  return state.TrainState(
    jnp.int32(0), params, {}, tx.init(params), params if ema else None
  )


def train(old, tx, batch, **options):
  return steps.train_step(
    old, batch, jax.random.key(1), apply_fn=table, tx=tx, **options
  )


def evaluated(train_state):
  batch = workers.tiny_batch()
  return steps.eval_step(train_state, batch, apply_fn=table).loss


def test_evaluation_does_not_smooth():
  tx = optax.sgd(0.0)
  start = table_state(tx)
  loss = lambda **options: (
    train(start, tx, workers.tiny_batch(), **options)[1].loss
  )
  assert evaluated(start) == loss()
  assert abs(evaluated(start) - loss(label_smoothing=0.5)) > 0.1


def test_average_of_the_parameters():
  tx = optax.sgd(0.5)
  new = table_state(tx, ema=True)
  expected = new.params["w"]
  for number in range(4):
    new, _ = train(new, tx, workers.tiny_batch(number), ema_decay=0.3)
    decay = min(0.3, (1 + number) / (10 + number))
    expected = decay * expected + (1 - decay) * new.params["w"]
  # float32, numbers of order one.
  np.testing.assert_allclose(new.ema["w"], expected, atol=1e-6)
  assert not np.allclose(new.ema["w"], new.params["w"], atol=1e-3)
  # It is what the model is evaluated with.
  assert evaluated(new) == evaluated(new._replace(params=new.ema, ema=None))
  assert evaluated(new) != evaluated(new._replace(ema=None))


def test_a_step_that_is_skipped_leaves_the_average():
  tx = optax.sgd(0.5)
  old = table_state(tx)
  old = old._replace(ema={"w": old.params["w"] + 1})
  batch = workers.tiny_batch()
  batch["weight"][5] = np.nan
  new, sums = train(old, tx, batch, ema_decay=0.9)
  assert sums.skipped == 1
  np.testing.assert_array_equal(new.ema["w"], old.ema["w"])


@pytest.fixture(scope="module")
def patient(tiny_config):
  """A run whose first evaluation stays the best, and which has an average."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "is_better", lambda dev, best: best is None)
    yield tiny_config(
      **{
        "optim.ema_decay": 0.9,
        "optim.label_smoothing": 0.1,
        "train.num_steps": 40,
        "eval.every": 4,
        "eval.patience": 3,
        "checkpoint.every": 100,
      }
    )


@pytest.fixture(scope="module")
def stopped(patient, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("stopped")
  return workdir, train_and_evaluate(patient, workdir)


@pytest.mark.slow
def test_early_stopping(stopped):
  workdir, result = stopped
  # Evaluations at 4, 8, 12, 16: three were no better than the first.
  assert result["step"] == 16 and result["best_step"] == 4
  rows = read_rows(workdir)
  assert [r["step"] for r in rows if "dev/loss" in r] == [4, 8, 12, 16]
  names = saved_arrays(workdir, 4).keys()
  assert any("['params']" in name for name in names)  # the best are kept
  assert "16 of 40, stopped early" in (workdir / "report.md").read_text()


@pytest.mark.slow
def test_average_and_patience_go_on_after_a_stop(
  stopped, patient, tmp_path, monkeypatch
):
  # Stopped in step 11, it goes on from the checkpoint of the best step, 4.
  with monkeypatch.context() as patch:
    patch.setattr(parallel.DataParallelStep, "__call__", workers.stopping(11))
    with pytest.raises(KeyboardInterrupt):
      train_and_evaluate(patient, tmp_path)
  train_and_evaluate(patient, tmp_path)
  workdir, _ = stopped
  assert without_times(read_rows(tmp_path)) == without_times(read_rows(workdir))
  last = saved_arrays(workdir, 16)
  same_arrays(saved_arrays(tmp_path, 16), last)
  averages = [name for name in last if "['ema']" in name]
  assert averages and all(
    not np.array_equal(last[name], last[name.replace("ema", "params")])
    for name in averages
    if last[name].any()  # not what has no gradient
  )


@pytest.mark.slow
def test_killed_before_its_result_it_trains_no_further(
  stopped, patient, tmp_path, caplog
):
  workdir = shutil.copytree(stopped[0], tmp_path / "copy")
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  assert "test/accuracy" in json.loads(lines[-1])
  (workdir / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
  absl_logging.set_verbosity(absl_logging.INFO)
  with caplog.at_level(logging.INFO, logger="absl"):
    result = train_and_evaluate(patient, workdir)
  (line,) = [m for m in caplog.messages if "stops early" in m]
  assert "step 16: 3 evaluations without a better one than that of step 4" in (
    line
  )
  untimed = lambda row: without_times([row])
  assert untimed(result) == untimed(stopped[1])


def learner_update(feature_map_lr):
  config = default_config().optim
  config.update(warmup_steps=0, lr=0.1)
  config.feature_map_lr = feature_map_lr
  tx = optim.make_optimizer(config, 100)
  params = {
    "attention": {"feature_map": {"rows": jnp.ones(3)}, "w": jnp.ones(3)}
  }
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  return updates["attention"]


def test_learners_have_a_rate_of_their_own():
  own, same = learner_update(0.02), learner_update(None)
  np.testing.assert_array_equal(own["w"], same["w"])
  np.testing.assert_allclose(
    own["feature_map"]["rows"], 0.2 * same["feature_map"]["rows"], rtol=1e-6
  )


def test_a_rate_without_learners_is_a_mistake(tiny_config, tmp_path):
  changes = {"optim.feature_map_lr": 1e-3}
  with pytest.raises(ValueError, match="must be None for oprf-orf.*got 0.001"):
    train_and_evaluate(tiny_config(**changes), tmp_path)
  changes["model.attention"] = "softmax"
  with pytest.raises(ValueError, match="must be None for this attention"):
    train_and_evaluate(tiny_config(**changes), tmp_path)
  assert not any(tmp_path.iterdir())
  config = tiny_config(**changes).optim
  for pair in (("posrf", "generator"), ("oprf", "fastfood_learnable")):
    optim.check_feature_map_lr(config, feature_map(*pair, num_features=8))
