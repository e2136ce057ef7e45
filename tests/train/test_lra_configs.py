"""The experiments on Long Range Arena."""

import importlib
import math

import pytest

from spectraformer_jax import data
from spectraformer_jax.train.config import default_config, flatten, validate
from spectraformer_jax.train.loop import train_and_evaluate
from tests.data import made_up
from tests.train.helpers import TINY

# Steps, batch, learning rate, warm-up, evaluation: as the release has them; it
# has none for pathx.
RELEASE = {
  "listops": (50_000, 32, 1e-4, 1000, 500),
  "text": (50_000, 32, 1e-4, 80, 500),
  "retrieval": (50_000, 16, 2e-4, 800, 1000),
  "image": (50_000, 256, 1e-4, 175, 50),
  "pathfinder": (50_000, 128, 2e-4, 312, 500),
  "pathx": (50_000, 64, 2e-4, 312, 500),
}
# The same of Long Range Arena's code, then layers, heads, head, MLP, pooling.
LRA = {
  "listops": (5000, 32, 0.05 / math.sqrt(1000), 1000, 50),
  "text": (20_000, 32, 0.05 / math.sqrt(8000), 8000, 100),
  "retrieval": (5000, 32, 0.05 / math.sqrt(8000), 8000, 100),
  "image": (35_000, 256, 5e-4, 175, 175),
  "pathfinder": (62_400, 512, 1e-3, 312, 312),
  "pathx": (500_000, 64, 1e-3, 2500, 2500),
}
LRA_MODEL = {
  "listops": (512, 4, 8, 64, 1024, "cls", 0.1),
  "text": (256, 4, 4, 64, 1024, "cls", 0.1),
  "retrieval": (128, 4, 4, 32, 512, "cls", 0.1),
  "image": (128, 1, 8, 8, 128, "cls", 0.3),
  "pathfinder": (32, 4, 4, 4, 32, "mean", 0.2),
  "pathx": (32, 1, 2, 8, 32, "mean", 0.1),
}


def values_of(task, variant=None):
  config = importlib.import_module(f"configs.{task}").get_config(variant)
  validate(config)
  values = flatten(config.to_dict())
  assert values["task.name"] == task
  assert values["eval.batch_size"] == values["train.batch_size"]
  assert values.keys() == flatten(default_config().to_dict()).keys()
  return values


def training(values):
  return tuple(
    pytest.approx(values[path]) if path == "optim.lr" else values[path]
    for path in (
      "train.num_steps",
      "train.batch_size",
      "optim.lr",
      "optim.warmup_steps",
      "eval.every",
    )
  )


@pytest.mark.parametrize("task", RELEASE)
def test_settings_of_the_release(task):
  values, default = values_of(task), flatten(default_config().to_dict())
  assert training(values) == RELEASE[task]
  vocab_size = {"listops": None, "image": None}.get(task, 512)
  assert values["model.vocab_size"] == vocab_size
  same = {
    path
    for path in default
    if path.split(".")[0] in ("model", "feature_map", "optim")
    and path not in ("model.vocab_size", "optim.lr", "optim.warmup_steps")
  }
  assert {p: values[p] for p in same} == {p: default[p] for p in same}


@pytest.mark.parametrize("task", LRA)
def test_settings_of_long_range_arena(task):
  values = values_of(task, "lra")
  assert training(values) == LRA[task]
  assert (
    tuple(
      values[f"model.{name}"]
      for name in (
        "embed_dim",
        "num_layers",
        "num_heads",
        "head_dim",
        "mlp_dim",
        "pooling",
        "dropout_rate",
      )
    )
    == LRA_MODEL[task]
  )
  assert (values["optim.b2"], values["optim.eps"]) == (0.98, 1e-9)
  text = task in ("listops", "text", "retrieval")
  assert values["optim.weight_decay"] == (0.1 if text else 0.0)
  assert values["optim.schedule"] == ("rsqrt" if text else "cosine")
  assert values["optim.clip"] == ("global_norm" if task == "pathx" else "none")


@pytest.mark.parametrize("variant", [None, "lra", "pathx", "quick"])
def test_pictures_drawn_here_have_the_settings_of_those_of_the_files(variant):
  values = values_of("pathfinder_synthetic", variant)
  settings = data.TASKS.build(
    values["task.name"], values["task.kwargs"] | {"seed": 0}
  ).settings
  assert settings["side"] == (128 if variant == "pathx" else 32)
  assert settings["bars"] == (6 if variant == "quick" else 14)
  if variant == "quick":
    return
  same = ("pathx", None) if variant == "pathx" else ("pathfinder", variant)
  others = values_of(*same)
  different = {p for p in values if values[p] != others[p]}
  assert different - {"task.kwargs"} == {"task.name"}


@pytest.mark.parametrize("task", RELEASE)
def test_headers_say_what_to_expect(task):
  module = importlib.import_module(f"configs.{task}")
  for words in (f"--config=configs/{task}.py", f"{task}.py:lra", "README"):
    assert words in module.__doc__, words
  with pytest.raises(ValueError, match="Unknown variant 'fast'.*lra"):
    module.get_config("fast")


@pytest.mark.slow
def test_pairs_are_trained(cache_dir, tmp_path):
  made_up.write_aan(tmp_path / "lra" / "tsv_data")
  config = importlib.import_module("configs.retrieval").get_config()
  values = TINY | {
    "task.name": "retrieval",
    "task.cache_dir": cache_dir,
    "task.pad_to_multiple": 16,
    "feature_map.component": "posrf",
    "feature_map.weight_matrix": "iid",
    "train.num_steps": 4,
    "train.batch_size": 8,
    "eval.every": 4,
    "eval.batch_size": 8,
    "checkpoint.every": 4,
    "logging.every": 4,
  }
  config.update_from_flattened_dict(values)
  config.task.kwargs = {"data_dir": str(tmp_path / "lra"), "max_len": 16}
  result = train_and_evaluate(config, tmp_path / "run")
  assert result["task"] == "retrieval-max_len16"
  assert result["provenance"] == "lra-files"
  assert math.isfinite(result["test/loss_last"])


@pytest.mark.slow
def test_buckets_are_trained_and_evaluated(cache_dir, tmp_path, monkeypatch):
  config = importlib.import_module("configs.listops").get_config()
  values = TINY | {
    "task.name": "listops",
    "task.cache_dir": cache_dir,
    "task.pad_to_multiple": 8,
    "feature_map.component": "posrf",
    "feature_map.weight_matrix": "iid",
    "train.num_steps": 4,
    "train.batch_size": 8,
    "eval.every": 4,
    "eval.batch_size": 8,
    "checkpoint.every": 4,
    "logging.every": 4,
  }
  config.update_from_flattened_dict(values)
  config.task.buckets = (12,)
  sizes = {"num_train": 32, "num_dev": 16, "num_test": 16}
  config.task.kwargs = {"min_len": 4, "max_len": 24} | sizes
  widths, gather = [], data.Batches._gather
  monkeypatch.setattr(
    data.Batches,
    "_gather",
    lambda self, indices, width: (
      widths.append(width) or gather(self, indices, width)
    ),
  )
  result = train_and_evaluate(config, tmp_path / "run")
  assert set(widths) == {16, 24}
  assert math.isfinite(result["test/loss_last"])


def test_missing_files_end_before_anything_is_compiled(tmp_path):
  config = importlib.import_module("configs.text").get_config()
  with pytest.raises(ValueError, match="task 'text' needs data_dir="):
    train_and_evaluate(config, tmp_path / "run")
