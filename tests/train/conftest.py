"""A tiny experiment that shows every moving part in a few seconds."""

import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from ml_collections import ConfigDict

from spectraformer_jax.train.config import default_config
from spectraformer_jax.train.loop import train_and_evaluate

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


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
  """One token cache for all tests."""
  return str(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def tiny_config(cache_dir):
  """`tiny_config(**{"optim.lr": 1.0})`: the tiny config with changes."""

  def make(**changes) -> ConfigDict:
    config = default_config()
    values = TINY | {"task.cache_dir": cache_dir} | changes
    config.update_from_flattened_dict(values)
    return config.lock()

  return make


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, tiny_config):
  """The finished tiny run that others are compared with: workdir, result."""
  workdir = tmp_path_factory.mktemp("uninterrupted")
  return workdir, train_and_evaluate(tiny_config(), workdir)


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
