"""Runs that learn the outputs of another run's model."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax import nn
from spectraformer_jax.nn import from_config
from spectraformer_jax.train.inputs import load_data, make_batches
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.run import describe
from spectraformer_jax.train.run.writers import read_rows
from spectraformer_jax.train.step.steps import weighted_sums
from spectraformer_jax.train.teacher import load_teacher


def test_the_loss_is_least_at_the_teachers_logits():
  logits, other = jax.random.normal(jax.random.key(0), (2, 5, 3))
  label, weight = jnp.array([0, 1, 2, 0, 1]), jnp.arange(5.0)
  loss = lambda x: weighted_sums(x, label, weight, 0.0, logits).loss
  np.testing.assert_allclose(jax.grad(loss)(logits), 0.0, atol=1e-6)
  assert loss(other) > loss(logits)
  expected = -weight @ jnp.sum(
    jax.nn.softmax(logits) * jax.nn.log_softmax(other), axis=1
  )
  np.testing.assert_allclose(loss(other), expected, rtol=1e-6)
  # Hits are those of the labels.
  hits = weighted_sums(other, label, weight, 0.0, logits).correct
  assert hits == weighted_sums(other, label, weight).correct


@pytest.fixture(scope="module")
def taught(uninterrupted, tiny_config, tmp_path_factory):
  """A run of one step of rate 0, in all but name, from its own teacher."""
  workdir, _ = uninterrupted
  config = tiny_config(
    **{
      "train.teacher": str(workdir),
      "model.init_from": str(workdir),
      "model.init_head": True,
      "model.dropout_rate": 0.0,
      "train.num_steps": 1,
      "optim.warmup_steps": 0,
      "optim.lr": 1e-30,
    }
  )
  folder = tmp_path_factory.mktemp("taught")
  return folder, config, train_and_evaluate(config, folder)


@pytest.mark.slow
def test_a_model_that_is_its_teacher_has_the_entropy_as_its_loss(
  taught, uninterrupted
):
  folder, config, result = taught
  model, variables = nn.load_pretrained(uninterrupted[0])
  batch = next(make_batches(config, load_data(config)["train"], train=True))
  logits = jax.jit(model.apply)(variables, batch["tokens"], batch["length"])
  p = jax.nn.softmax(logits)
  entropy = -jnp.mean(jnp.sum(p * jnp.log(p), axis=1))
  (row,) = [x for x in read_rows(folder) if "train/loss" in x]
  # float32 sums of two programs.
  assert row["train/loss"] == pytest.approx(float(entropy), rel=1e-5)
  accuracy = uninterrupted[1]["test/accuracy_best"]
  assert result["test/accuracy"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.slow
def test_the_teacher_is_recorded_and_checked(taught, uninterrupted, tmp_path):
  source, config, _ = taught
  folder = shutil.copytree(source, tmp_path / "copy")
  stored = json.loads((folder / "config.json").read_text())
  assert stored["teacher"]["step"] == uninterrupted[1]["best_step"]
  assert len(stored["teacher"]["fingerprint"]) == 12
  step = stored["teacher"]["step"]
  line = f"| teacher | {uninterrupted[0]}, step {step} |"
  assert line in (folder / "report.md").read_text()
  (folder / "metrics.jsonl").unlink()  # it has not finished
  stored["teacher"]["fingerprint"] = "0"
  (folder / "config.json").write_text(json.dumps(stored))
  with pytest.raises(ValueError, match="another teacher: fingerprint .* '0'"):
    train_and_evaluate(config, folder)


@pytest.mark.parametrize(
  ("changes", "facts", "message"),
  [
    ({}, {"vocab_size": 18}, "its vocab_size is 17, and that here is 18"),
    ({}, {"tokenizer": "x"}, "its tokenizer is 'pixels', and that here is 'x'"),
    ({}, {"num_classes": 3}, "its num_classes is 10, and that here is 3"),
    (
      {"train.objective": "masked"},
      {},
      "its train.objective is 'classify', and that here is 'masked'",
    ),
    ({"model.max_len": 70}, {}, "made for 64 positions, and this run has 70"),
    ({"train.teacher": "/no"}, {}, "'/no': '/no' is no workdir"),
  ],
)
def test_teachers_of_something_else_are_refused(
  changes, facts, message, uninterrupted, tiny_config
):
  config = tiny_config(**{"train.teacher": str(uninterrupted[0])} | changes)
  dataset = load_data(config, ["train"])["train"]
  facts = describe.split_facts(dataset) | facts
  feature_map = from_config.make_feature_map(config)
  model = from_config.make_model(config, feature_map, facts)
  with pytest.raises(
    ValueError, match="config.train.teacher=.*" + message
  ) as e:
    load_teacher(config, model, facts)
  assert "\n" not in str(e.value)
