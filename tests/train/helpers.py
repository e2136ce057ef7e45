"""Settings, processes and comparisons that several tests of training share."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from spectraformer_jax.nn.from_config import make_feature_map, make_model
from spectraformer_jax.train.config import to_dict
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.run.checkpoints import Checkpointer
from spectraformer_jax.train.step.state import TrainState, create, run_keys
from tests.train import workers

ROOT = pathlib.Path(__file__).parents[2]

# The loss falls from 2.3 to 1.8; compiling takes most of the time.
TINY = {
  "task.name": "digits",
  "model.embed_dim": 32,
  "model.num_layers": 1,
  "model.num_heads": 2,
  "model.head_dim": 8,
  "model.mlp_dim": 16,
  "feature_map.num_features": 16,
  "optim.lr": 5e-3,
  "optim.schedule": "cosine",
  "optim.warmup_steps": 2,
  "optim.clip": "global_norm",
  "train.num_steps": 48,
  "train.batch_size": 32,
  "eval.every": 16,
  "eval.batch_size": 64,
  "checkpoint.every": 12,
  "logging.every": 8,
  "logging.tensorboard": False,
  "logging.progress_bar": False,
}


# Facts about data that exist only in tests.
TOY = {"name": "toy", "vocab_size": 17, "num_classes": 3, "length": 8}
TOY |= {"pair": False, "tokenizer": "toy", "id_shift": 0}

# Endings of the metrics that differ between two equal runs.
TIMES = ("time", "seconds", "per_second", "bytes")

# When one of orbax's parallel reads fails, the others are still running.
broken_reads = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def as_flags(config_values: dict) -> list[str]:
  """Overrides as command-line flags."""
  return [f"--config.{path}={value}" for path, value in config_values.items()]


@contextlib.contextmanager
def start_python(
  *args: str, devices: int = 1, cwd: pathlib.Path | None = None
) -> Iterator[subprocess.Popen]:
  """A Python process of its own, with that many virtual CPU devices.

  It is killed and its pipes are closed at the end, however the test ends.
  """
  env = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  with subprocess.Popen(
    [sys.executable, *args],
    env=env,
    cwd=cwd or ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      yield process
    finally:
      process.kill()


def run_python(*args: str, timeout: float = 600, **kwargs):
  """Runs `start_python` to its end; (return code, stdout, stderr)."""
  with start_python(*args, **kwargs) as process:
    out, err = process.communicate(timeout=timeout)
  return process.returncode, out, err


def saved_arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """All arrays of a checkpoint by path, read without knowing their shapes."""
  path = workdir / "checkpoints" / str(step) / "state"
  tree = ocp.StandardCheckpointer().restore(path.absolute())
  return workers.named("", tree)


def same_arrays(
  one: dict[str, np.ndarray], two: dict[str, np.ndarray], atol: float = 0.0
) -> None:
  """Asserts that two checkpoints hold the same arrays, up to `atol`."""
  assert one.keys() == two.keys() and one
  for name in one:
    np.testing.assert_allclose(
      one[name], two[name], rtol=0, atol=atol, err_msg=name
    )


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows of metrics without speeds, times and memory."""
  return [
    {k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows
  ]


def make_state(step: int, value: float = 0.0) -> TrainState:
  """A training state of a few numbers."""
  return TrainState(
    np.asarray(step, np.int32),
    {"w": np.full((2, 3), value, np.float32)},
    {"random_features": {"bits": np.arange(4, dtype=np.uint8)}},
    ({"count": np.asarray(step, np.int32)}, ()),
  )


def save(
  checkpointer: Checkpointer, step: int, best_step: int | None = None
) -> None:
  """Saves `make_state(step)`."""
  checkpointer.save(make_state(step, step), {"note": step}, best_step=best_step)


def finished_folder(path, config, best_step=3):
  """The workdir of a finished run of that config, with made-up weights."""
  facts = TOY | {"fingerprint": "0"}
  feature_map = make_feature_map(config)
  model = make_model(config, feature_map, facts)
  new = create(model, feature_map, optax.sgd(1.0), run_keys(7))
  new = parallel.to_host(new._replace(step=np.int32(best_step)))
  stored = {"config": to_dict(config), "data": {"train": facts}}
  stored["environments"] = [{}]
  path.mkdir()
  (path / "config.json").write_text(json.dumps(stored))
  with Checkpointer(path / "checkpoints", keep=1) as checkpointer:
    best = {"step": best_step, "accuracy": 0.5, "loss": 1.0}
    checkpointer.save(new, {"best": best}, best_step=best_step)
  row = {"step": best_step, "test/accuracy": 0.5}
  (path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  return new


def first_state(config, **facts):
  """The first state of a run with that config, on data with these facts."""
  feature_map = make_feature_map(config)
  model = make_model(config, feature_map, TOY | facts)
  return create(model, feature_map, optax.sgd(1.0), run_keys(0))
