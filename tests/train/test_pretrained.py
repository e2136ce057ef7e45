"""A trained model without the training code: from Python, and by commands."""

import io
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import optax
import pytest

from spectraformer_jax import data, nn
from spectraformer_jax.nn import from_config
from spectraformer_jax.train import predict
from spectraformer_jax.train.__main__ import main
from spectraformer_jax.train.config import to_dict
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.evaluate import evaluate
from spectraformer_jax.train.inputs import load_data
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.run.checkpoints import Checkpointer
from spectraformer_jax.train.step import state
from tests.train import workers
from tests.train.helpers import run_python, same_arrays


@pytest.fixture(scope="module")
def dev(tiny_config):
  return load_data(tiny_config(), ["dev"])["dev"]


def batch_of(dataset, size):
  return next(data.Batches(dataset, size, seed=0, train=False))


@pytest.mark.slow
def test_gives_the_best_or_any_other_checkpoint(uninterrupted, dev):
  workdir, result = uninterrupted
  model, variables = nn.load_pretrained(workdir)
  batch = batch_of(dev, len(dev))
  logits = jax.jit(model.apply)(variables, batch["tokens"], batch["length"])
  accuracy = np.mean(np.argmax(logits, axis=-1) == batch["label"])
  assert accuracy == pytest.approx(result["dev/accuracy_best"], abs=1e-6)
  other = nn.load_pretrained(str(workdir), step=32).variables
  assert jax.tree.structure(other) == jax.tree.structure(variables)
  assert any(
    not np.array_equal(a, b)
    for a, b in zip(
      jax.tree.leaves(other), jax.tree.leaves(variables), strict=True
    )
  )


def test_neither_optax_nor_the_training_code_is_imported(uninterrupted):
  code, out, err = run_python(
    "-c",
    "import sys\n"
    "from spectraformer_jax import nn\n"
    "late = 'orbax' in sys.modules\n"
    f"model, variables = nn.load_pretrained({str(uninterrupted[0])!r})\n"
    "names = [n for n in sys.modules if n.startswith('spectraformer_jax.')]\n"
    "print(late, 'optax' in sys.modules, model.num_layers,\n"
    "  [n for n in names if n.split('.')[1] in ('train', 'data')])",
  )
  assert code == 0, err
  assert out.split() == ["False", "False", "1", "[]"]


@pytest.fixture
def copy(uninterrupted, tmp_path):
  """A copy of the run to spoil."""
  return shutil.copytree(uninterrupted[0], tmp_path / "copy")


def test_mistakes(uninterrupted, copy, tmp_path):
  workdir, _ = uninterrupted
  with pytest.raises(ValueError, match="no workdir: no config.json"):
    nn.load_pretrained(tmp_path)
  with pytest.raises(ValueError, match="no checkpoint of step 5, .*32, 36, 48"):
    nn.load_pretrained(workdir, step=5)
  stored = json.loads((copy / "config.json").read_text())
  stored["config"]["model"]["mlp_dim"] = 8
  (copy / "config.json").write_text(json.dumps(stored))
  with pytest.raises(
    ValueError, match="step 48 .*encoder/layer_0/.*the model needs"
  ):
    nn.load_pretrained(copy)
  shutil.rmtree(copy / "checkpoints")
  with pytest.raises(ValueError, match="holds no checkpoint"):
    nn.load_pretrained(copy)


def test_what_is_not_what_was_written_is_refused(copy, monkeypatch):
  record = copy / "checkpoints" / "48" / "record" / "metadata"
  stored = json.loads(record.read_text())
  stored["variables_checksum"] = "0"
  record.write_text(json.dumps(stored))
  with pytest.raises(ValueError, match="differs from what was written"):
    nn.load_pretrained(copy)


@pytest.mark.slow
def test_the_average_is_what_is_given(tiny_config, tmp_path, dev):
  changes = {"optim.ema_decay": 0.5, "train.num_steps": 8, "eval.every": 8}
  result = train_and_evaluate(tiny_config(**changes), tmp_path)
  again = evaluate(tmp_path, split="dev")
  assert again["accuracy"] == pytest.approx(result["dev/accuracy_best"])


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.quick_every(2)
def test_evaluate(devices, uninterrupted):
  workdir, result = uninterrupted
  code, out, err = run_python(
    "-m",
    "spectraformer_jax.train",
    "evaluate",
    f"--workdir={workdir}",
    "--step=last",
    "--batch_size=32",
    devices=devices,
  )
  assert code == 0, err
  found = json.loads(out)
  assert found["devices"] == devices and found["examples"] == 151
  assert found["step"] == 48 and found["split"] == "test"
  for name in ("loss", "accuracy"):
    # float32 sums in batches of another size.
    assert found[name] == pytest.approx(result[f"test/{name}_last"], rel=1e-5)


def test_evaluate_refuses_other_data(copy, capsys):
  stored = json.loads((copy / "config.json").read_text())
  stored["data"]["test"]["fingerprint"] = "0"
  (copy / "config.json").write_text(json.dumps(stored))
  assert main(["evaluate", f"--workdir={copy}"]) == 2
  assert "other data: the test split" in capsys.readouterr().err
  assert main(["evaluate", f"--workdir={copy}", "--step=3"]) == 2
  assert "no checkpoint of step '3'" in capsys.readouterr().err


def test_predict(uninterrupted, dev, tmp_path, monkeypatch, capsys):
  workdir, _ = uninterrupted
  batch = batch_of(dev, 5)
  model, variables = nn.load_pretrained(workdir)
  expected = jax.nn.softmax(
    jax.jit(model.apply)(variables, batch["tokens"], batch["length"])
  )
  np.savez(tmp_path / "batch.npz", **batch)
  text = "\n".join(" ".join(map(str, row)) for row in batch["tokens"]) + "\n"
  (tmp_path / "ids.txt").write_text(text)
  monkeypatch.setattr(sys, "stdin", io.StringIO(text))
  for given in (tmp_path / "batch.npz", tmp_path / "ids.txt", "-"):
    command = ["predict", f"--workdir={workdir}", str(given), "--batch_size=3"]
    assert main(command) == 0
    rows = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    found = np.array([row["probabilities"] for row in rows])
    # Printed with six digits.
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [r["label"] for r in rows] == np.argmax(expected, -1).tolist()


FACTS = {
  "tokenizer": "bytes",
  "id_shift": 1,
  "length": 8,
  "pair": False,
  "vocab_size": 257,
}


def test_text_becomes_the_ids_of_its_task():
  read = lambda line, **facts: [
    ids.tolist() for ids in predict.read_text([line], FACTS | facts)[0]
  ]
  assert read("ab c\n") == [[98, 99, 33, 100]]
  assert read("ab\tc\n", pair=True) == [[98, 99], [100]]
  words = {"tokenizer": "words", "id_shift": 0, "vocab_size": 2048, "length": 3}
  assert read("Never say never: 12345!", **words) == [[1837, 1837, 1012]]
  listops = {"tokenizer": "full", "id_shift": 0, "vocab_size": 17}
  assert read("[MAX 2 3 ]", **listops) == [[12, 3, 4, 15]]
  assert read("[MAX 2 3 ]", **listops | {"tokenizer": "no_close"}) == [
    [12, 3, 4]
  ]
  pixels = {"tokenizer": "pixels", "id_shift": 0, "vocab_size": 17}
  assert read("0 16 3", **pixels) == [[0, 16, 3]]


@pytest.mark.parametrize(
  "facts, lines, message",
  [
    ({}, ["a", ""], "Line 2: an input must have 1 to 8 tokens, got 0"),
    ({"pair": True}, ["a b"], "Line 1: a pair is two texts with a tab"),
    ({"tokenizer": "full"}, ["[MAX 2 ]", "[MX 2 ]"], "Line 2: Unknown.*'.MX'"),
    (
      {"tokenizer": "pixels"},
      ["a b"],
      "Line 1: tokenizer 'pixels' has no text",
    ),
    (
      {"tokenizer": "pixels"},
      ["1 300"],
      r"Line 1: ids .* \[0, 257\), got 1 to",
    ),
    ({"tokenizer": "pixels"}, ["1 " * 9], "Line 1: .*1 to 8 tokens, got 9"),
  ],
)
def test_bad_lines(facts, lines, message):
  with pytest.raises(ValueError, match=message) as error:
    predict.read_text(lines, FACTS | facts)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "arrays, message",
  [
    ({"x": np.ones((2, 3), int)}, r"tokens must be ints \[n, T\], got none"),
    ({"tokens": np.ones((2, 3))}, r"got float64\(2, 3\)"),
    ({"tokens": np.ones((2, 9), int)}, "Row 0: .*1 to 8 tokens, got 9"),
    ({"tokens": np.full((2, 3), 257)}, r"Row 0: ids must lie in \[0, 257\)"),
    (
      {"tokens": np.ones((2, 3), int), "length": np.array([3, 4])},
      r"length must lie in \[0, 3\], got 3 to 4",
    ),
  ],
)
def test_bad_arrays(arrays, message, tmp_path):
  path: pathlib.Path = tmp_path / "x.npz"
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match=message):
    predict.read_npz(path, FACTS)


def test_no_archive(tmp_path, uninterrupted, capsys):
  path = tmp_path / "x.npz"
  path.write_text("text")
  assert main(["predict", f"--workdir={uninterrupted[0]}", str(path)]) == 2
  assert "is no .npz of arrays" in capsys.readouterr().err
  assert main(["predict", f"--workdir={tmp_path}"]) == 2
  assert "is no workdir" in capsys.readouterr().err
  assert main(["classify"]) == 2
  assert "unknown command 'classify'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_matrix_that_cannot_be_drawn_while_tracing(tiny_config, tmp_path):
  config = tiny_config(**{"feature_map.weight_matrix": "fastfood_learnable"})
  facts = FACTS | {"name": "toy", "num_classes": 3}
  stored = {"config": to_dict(config), "data": {"train": facts}}
  (tmp_path / "config.json").write_text(json.dumps(stored))
  feature_map = from_config.make_feature_map(config)
  model = from_config.make_model(config, feature_map, facts)
  new = state.create(model, feature_map, optax.sgd(1.0), state.run_keys(0))
  with Checkpointer(tmp_path / "checkpoints", keep=1) as checkpointer:
    checkpointer.save(parallel.to_host(new), {"best": None}, best_step=None)
  found = nn.load_pretrained(tmp_path, step="last")
  assert found.model == model
  same_arrays(
    workers.named("", found.variables), workers.named("", new.variables)
  )
  with pytest.raises(ValueError, match="not evaluated yet.*use 'last'"):
    nn.load_pretrained(tmp_path)
