"""A run of made-up weights, and its conversion."""

import pytest

from spectraformer_jax.linearize.__main__ import main
from tests.linearize.runs.helpers import run_config, write_run

OPTIONS = ("--num_features=4", "--steps=3", "--examples=4", "--held_out=2")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
  """The workdir of the run, its config, its variables."""
  config = run_config(tmp_path_factory.mktemp("tokens"))
  folder = tmp_path_factory.mktemp("run")
  return folder, config, write_run(folder, config)


@pytest.fixture(scope="session")
def convert(run):
  """`convert(out, *flags)`: the command; returns its exit status."""

  def call(out, *flags):
    return main([f"--workdir={run[0]}", f"--out={out}", *OPTIONS, *flags])

  return call


@pytest.fixture(scope="session")
def converted(convert, tmp_path_factory):
  """The folder of a conversion."""
  out = tmp_path_factory.mktemp("out")
  assert convert(out) == 0
  return out
