import json
import shutil

import jax
import numpy as np
import pytest

from spectraformer_jax.nn import load_pretrained
from spectraformer_jax.train.config import to_dict
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.run.checkpoints import Checkpointer
from spectraformer_jax.train.run.run_folder import check_config
from spectraformer_jax.train.run.writers import read_rows
from spectraformer_jax.train.run_steps import Due, due
from tests.train import workers
from tests.train.helpers import (
  run_python,
  same_arrays,
  saved_arrays,
  without_times,
)


def test_due_after_a_step(tiny_config):
  config = tiny_config()  # rows at 8, evaluations at 16, checkpoints at 12
  assert due(config, 7) == Due(log=False, evaluate=False, save=False)
  assert due(config, 8) == Due(log=True, evaluate=False, save=False)
  assert due(config, 16) == Due(log=True, evaluate=True, save=False)
  assert due(config, 36) == Due(log=False, evaluate=False, save=True)
  assert due(config, 7, stop=True) == Due(log=False, evaluate=False, save=True)
  last = tiny_config(**{"train.num_steps": 47})
  assert due(last, 47) == Due(log=True, evaluate=True, save=True)


def test_loss_falls_and_rows_are_complete(uninterrupted):
  workdir, result = uninterrupted
  rows = read_rows(workdir)
  train = [row for row in rows if "train/loss" in row]
  dev = [row for row in rows if "dev/loss" in row]
  assert [row["step"] for row in train] == [8, 16, 24, 32, 40, 48]
  assert [row["step"] for row in dev] == [16, 32, 48]
  assert train[-1]["train/loss"] < 0.85 * train[0]["train/loss"]
  assert dev[-1]["dev/accuracy"] > 0.25  # ten classes
  assert train[0].keys() == {
    "step",
    "train/loss",
    "train/accuracy",
    "train/learning_rate",
    "train/examples_per_second",
    "train/skipped_steps",
    "time",
  }
  assert rows[-1] == result
  assert result["test/accuracy"] == result["test/accuracy_best"]
  assert result["dev/accuracy_best"] == max(r["dev/accuracy"] for r in dev)
  assert result["parameters"] > 0 and result["projection_size"] == 2 * 16 * 8
  assert 0 < result["baselines"]["majority label"] < 0.3


def test_best_and_last_checkpoints_stay(uninterrupted):
  workdir, result = uninterrupted
  with Checkpointer(workdir / "checkpoints", keep=2) as checkpointer:
    steps = checkpointer.steps()
  # 32 was the best when 36 was written: whichever of the last two is
  # restored, its best is there.
  assert result["best_step"] == 48 and steps == [32, 36, 48]


def test_config_json(uninterrupted):
  stored = json.loads((uninterrupted[0] / "config.json").read_text())
  assert stored["config"]["optim"]["lr"] == 5e-3
  assert stored["data"]["dev"]["num_examples"] > 100
  (env,) = stored["environments"]
  assert env["jax"] == jax.__version__ and env["devices"] == ["cpu"]
  assert {"python", "jaxlib", "flax", "optax", "numpy"} <= env.keys()


def test_finished_run_is_not_trained_again(
  uninterrupted, tiny_config, monkeypatch
):
  workdir, result = uninterrupted
  before = (workdir / "metrics.jsonl").read_text()
  (workdir / "report.md").unlink()
  monkeypatch.setattr(parallel.DataParallelStep, "__call__", None)
  assert train_and_evaluate(tiny_config(), workdir) == result
  assert (workdir / "metrics.jsonl").read_text() == before
  assert (workdir / "report.md").exists()


@pytest.mark.parametrize("stop_at", [3, 23, 47])
@pytest.mark.quick_every(3)
def test_resume_is_bit_for_bit(
  stop_at, uninterrupted, tiny_config, tmp_path, monkeypatch
):
  # Checkpoints lie at 12, 24, 36, 48 and at the best, rows at 8, 16, 24, ...: a
  # stop at 3 starts anew, one at 47 leaves rows beyond the checkpoint.
  with monkeypatch.context() as patch:
    patch.setattr(
      parallel.DataParallelStep, "__call__", workers.stopping(stop_at)
    )
    with pytest.raises(KeyboardInterrupt):
      train_and_evaluate(tiny_config(), tmp_path)
  train_and_evaluate(tiny_config(), tmp_path)
  workdir, _ = uninterrupted
  same_arrays(saved_arrays(tmp_path, 48), saved_arrays(workdir, 48))
  assert without_times(read_rows(tmp_path)) == without_times(read_rows(workdir))


@pytest.mark.slow
def test_redraw_changes_projections_and_resumes(
  tiny_config, tmp_path, monkeypatch
):
  # Redraws before steps 5, 10, ...; the stop at 17 resumes from 16 or 12.
  config = tiny_config(
    **{
      "feature_map.redraw_interval": 5,
      "train.num_steps": 24,
      "checkpoint.keep": 9,
    }
  )
  one, two = tmp_path / "one", tmp_path / "two"
  train_and_evaluate(config, one)
  with monkeypatch.context() as patch:
    patch.setattr(parallel.DataParallelStep, "__call__", workers.stopping(17))
    with pytest.raises(KeyboardInterrupt):
      train_and_evaluate(config, two)
  train_and_evaluate(config, two)
  last = saved_arrays(one, 24)
  same_arrays(last, saved_arrays(two, 24))
  projection = [name for name in last if "random_features" in name]
  earlier = saved_arrays(one, 12)
  assert projection
  for name in projection:
    if last[name].std() > 0:  # not the constants among them
      assert not np.array_equal(last[name], earlier[name]), name


def test_optimizer_and_projection_are_saved(uninterrupted):
  names = saved_arrays(uninterrupted[0], 48)
  for part in ("['params']", "['opt_state']", "random_features", "['step']"):
    assert any(part in name for name in names), part


@pytest.mark.parametrize("devices", [(8, 1), (1, 8)])
@pytest.mark.slow
def test_checkpoint_moves_between_device_counts(devices, tiny_config, tmp_path):
  # Dropout keys belong to replicas, so only without dropout are runs equal.
  config = tiny_config(**{"model.dropout_rate": 0.0, "train.num_steps": 12})
  path = tmp_path / "config.json"
  path.write_text(json.dumps(config.to_dict()))
  for count, stop_at in zip(devices, ("10", "0"), strict=True):
    code, _, err = run_python(
      "-m",
      "tests.train.workers",
      "training",
      str(path),
      str(tmp_path / "run"),
      stop_at,
      devices=count,
    )
    assert code == 0, err
  train_and_evaluate(config, tmp_path / "one")
  stored = json.loads((tmp_path / "run" / "config.json").read_text())
  assert [len(e["devices"]) for e in stored["environments"]] == list(devices)
  # Twelve steps of Adam at lr 5e-3 from float32 sums in another order.
  same_arrays(
    saved_arrays(tmp_path / "run", 12),
    saved_arrays(tmp_path / "one", 12),
    atol=1e-4,
  )


@pytest.mark.slow
def test_engines_train_alike(uninterrupted, tiny_config, tmp_path, monkeypatch):
  # Begun with pmap, gone on with jit: the same steps in the same order.
  with monkeypatch.context() as patch:
    patch.setattr(parallel.DataParallelStep, "__call__", workers.stopping(23))
    with pytest.raises(KeyboardInterrupt):
      train_and_evaluate(tiny_config(), tmp_path)
  train_and_evaluate(tiny_config(**{"train.parallel": "jit"}), tmp_path)
  # One device, so that nothing is summed in another order.
  same_arrays(
    saved_arrays(tmp_path, 48), saved_arrays(uninterrupted[0], 48), atol=1e-6
  )


@pytest.mark.slow
def test_exact_softmax_baseline(tiny_config, tmp_path):
  config = tiny_config(
    **{"model.attention": "softmax", "train.num_steps": 4, "eval.every": 4}
  )
  result = train_and_evaluate(config, tmp_path)
  assert result["pair"] == "softmax" and result["projection_size"] == 0


@pytest.mark.parametrize(
  "component",
  [
    *("prototypes", "learned_exp", "hedgehog", "t2r", "rebased"),
    *("elu1", "cosformer", "taylor2", "dpfp"),
  ],
)
@pytest.mark.quick_every(9)
def test_pairs_without_a_weight_matrix_train(component, tiny_config, tmp_path):
  changes = {
    "feature_map.component": component,
    "feature_map.weight_matrix": "none",
    "train.num_steps": 4,
    "eval.every": 4,
  }
  config = tiny_config(**changes)
  result = train_and_evaluate(config, tmp_path)
  assert result["pair"] == f"{component}-none"
  assert result["projection_size"] == 0 and result["parameters"] > 0
  feature_map = load_pretrained(tmp_path).model.feature_map
  takes_num_features = feature_map.component.info.takes_num_features
  assert takes_num_features == (feature_map.num_features is not None)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"feature_map.component": "opfr"}, "'opfr'.*Did you mean 'oprf'"),
    ({"feature_map.weight_matrix": "orff"}, "'orff'.*Did you mean 'orf'"),
    ({"feature_map.component_kwargs": {"bb": 1}}, "no option 'bb'"),
    ({"feature_map.num_features": 0}, "num_features must be a positive"),
    ({"task.name": "digit"}, "'digit'.*Did you mean 'digits'"),
    ({"task.kwargs": {"sed": 1}}, "no option 'sed'"),
    ({"train.batch_size": 5000}, "at most the 1465 training examples"),
    ({"model.max_len": 8}, "max_len must be at least 64.*got 8"),
    ({"model.vocab_size": 8}, "vocab_size must be at least 17.*got 8"),
  ],
)
def test_user_errors_come_before_compilation(
  changes, message, tiny_config, tmp_path, monkeypatch
):
  monkeypatch.setattr(jax.stages.Lowered, "compile", None)
  with pytest.raises(ValueError, match=message) as error:
    train_and_evaluate(tiny_config(**changes), tmp_path)
  assert "\n" not in str(error.value)


def test_batch_must_fit_the_devices(tiny_config, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 3)
  with pytest.raises(
    ValueError, match="train.batch_size must be a multiple.* = 3, got 32"
  ):
    train_and_evaluate(tiny_config(), tmp_path)


def test_other_config_in_workdir(uninterrupted, tiny_config):
  workdir, _ = uninterrupted
  with pytest.raises(ValueError, match="optim.lr is 0.005 there and 0.1 here"):
    train_and_evaluate(tiny_config(**{"optim.lr": 0.1}), workdir)
  with pytest.raises(ValueError, match="component_kwargs is {} there"):
    train_and_evaluate(
      tiny_config(**{"feature_map.component_kwargs": {"kernel": "softmax"}}),
      workdir,
    )
  # What does not change the training may differ.
  harmless = {"logging.every": 7, "checkpoint.keep": 5}
  train_and_evaluate(tiny_config(**harmless), workdir)


ENDLESS = {
  "optim.schedule": "rsqrt",
  "train.num_steps": 16,
  "eval.every": 8,
  "checkpoint.every": 8,
}


def test_a_finished_run_goes_on_for_more_steps(tiny_config, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  whole = train_and_evaluate(tiny_config(**ENDLESS), one)
  short = tiny_config(**ENDLESS | {"train.num_steps": 8})
  assert train_and_evaluate(short, two)["step"] == 8
  result = train_and_evaluate(tiny_config(**ENDLESS), two)
  assert without_times([result]) == without_times([whole])
  same_arrays(saved_arrays(one, 16), saved_arrays(two, 16))
  assert without_times(read_rows(one)) == without_times(read_rows(two))
  stored = json.loads((two / "config.json").read_text())
  assert stored["config"]["train"]["num_steps"] == 16
  # Finished again, and never shorter.
  assert train_and_evaluate(tiny_config(**ENDLESS), two) == result
  with pytest.raises(ValueError, match="16 there and 8 here.* can only grow"):
    train_and_evaluate(short, two)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "rsqrt"])
def test_which_runs_may_go_on(schedule, tiny_config, tmp_path):
  changes = {"optim.schedule": schedule, "optim.warmup_steps": 2}
  before, after = (
    to_dict(tiny_config(**changes, **{"train.num_steps": steps}))
    for steps in (16, 48)
  )
  (tmp_path / "config.json").write_text(json.dumps({"config": before}))
  check = lambda config: check_config(tmp_path, config)
  if schedule == "rsqrt":
    check(after)
    after["train"]["batch_size"] = 16
    with pytest.raises(ValueError, match="batch_size is 32 there and 16 here"):
      check(after)
    return
  with pytest.raises(ValueError, match=f"'{schedule}' depends on it") as error:
    check(after)
  message = str(error.value)
  assert "train.num_steps is 16 there and 48 here" in message
  assert "\n" not in message


def test_run_of_an_older_version_goes_on(uninterrupted, tiny_config, tmp_path):
  workdir = shutil.copytree(uninterrupted[0], tmp_path / "copy")
  stored = json.loads((workdir / "config.json").read_text())
  del stored["config"]["train"]["max_skipped_steps"]
  (workdir / "config.json").write_text(json.dumps(stored))
  assert train_and_evaluate(tiny_config(), workdir) == uninterrupted[1]
  changed = tiny_config(**{"train.max_skipped_steps": 3})
  with pytest.raises(ValueError, match="max_skipped_steps is 10 there"):
    train_and_evaluate(changed, workdir)


def test_other_data_in_workdir(uninterrupted, tiny_config, tmp_path):
  workdir = shutil.copytree(uninterrupted[0], tmp_path / "copy")
  (workdir / "metrics.jsonl").unlink()
  stored = json.loads((workdir / "config.json").read_text())
  stored["data"]["train"]["fingerprint"] = "0"
  (workdir / "config.json").write_text(json.dumps(stored))
  with pytest.raises(ValueError, match="other data: the train split"):
    train_and_evaluate(tiny_config(), workdir)
