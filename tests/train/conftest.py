"""A tiny experiment that runs every part of training in a few seconds."""

import pytest
from ml_collections import ConfigDict

from spectraformer_jax.train.config import default_config
from spectraformer_jax.train.loop import train_and_evaluate
from tests.train.helpers import TINY


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
