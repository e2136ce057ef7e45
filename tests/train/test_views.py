"""A profiler trace, and Weights & Biases: both off unless asked for."""

import gzip
import json
import sys
import types

import pytest

from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.run import wandb_run
from spectraformer_jax.train.run.writers import read_rows


class FakeRun:
  def __init__(self, **kwargs):
    self.kwargs, self.rows, self.exit_code = kwargs, [], None

  def log(self, values, step):
    self.rows.append((step, dict(values)))

  def finish(self, exit_code=0):
    self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
  """A package of that name; its runs, in order."""
  package = types.ModuleType("wandb")
  package.runs = []

  def init(**kwargs):
    package.runs.append(FakeRun(**kwargs))
    return package.runs[-1]

  package.init = init
  monkeypatch.setitem(sys.modules, "wandb", package)
  return package.runs


def test_wandb_and_profile(tiny_config, tmp_path, wandb):
  changes = {
    "logging.wandb": "project",
    "profile": 2,
    "train.num_steps": 8,
    "eval.every": 4,
  }
  train_and_evaluate(tiny_config(**changes), tmp_path)
  (run,) = wandb
  assert run.exit_code == 0
  assert run.kwargs["project"] == "project" and run.kwargs["resume"] == "allow"
  assert run.kwargs["config"]["optim"]["lr"] == 5e-3
  assert run.kwargs["id"] == (tmp_path / "wandb_id.txt").read_text()
  logged = {(step, k): v for step, row in run.rows for k, v in row.items()}
  rows = {
    (row["step"], k): v
    for row in read_rows(tmp_path)
    for k, v in row.items()
    if "/" in k
  }
  assert logged == rows and (8, "test/accuracy") in logged
  (folder,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
  (trace,) = folder.glob("perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  assert len(events) > 10


def test_a_later_start_goes_on_in_the_same_wandb_run(
  tiny_config, tmp_path, wandb
):
  for _ in range(2):
    wandb_run.start("project", tmp_path, {})
  one, two = wandb
  assert one.kwargs["id"] == two.kwargs["id"]


def test_wandb_missing(tiny_config, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
  config = tiny_config(**{"logging.wandb": "project"})
  with pytest.raises(ValueError, match="wandb='project' needs.*pip install"):
    train_and_evaluate(config, tmp_path)
  assert not any(tmp_path.iterdir())
