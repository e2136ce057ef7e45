"""The command that converts a run, and what takes its results."""

import csv
import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from spectraformer_jax import nn
from spectraformer_jax.linearize.__main__ import main
from spectraformer_jax.linearize.records import NonFiniteLossError
from spectraformer_jax.linearize.runs import command
from spectraformer_jax.study.approximation import inputs
from spectraformer_jax.train import pretrained
from spectraformer_jax.train.__main__ import main as train_main
from spectraformer_jax.train.config import default_config
from spectraformer_jax.train.evaluate import evaluate
from spectraformer_jax.train.run import run_folder
from tests.linearize.runs.helpers import run_config, write_run
from tests.train.helpers import first_state


@pytest.mark.slow
def test_files(converted):
  text = (converted / "report.md").read_text()
  for needed in ("| conversion |", "| oprf-orf, not fitted |", "| layer_1 |"):
    assert needed in text, needed
  assert "prototypes-none, 4 features a head, no exact keys; 3 steps" in text
  for name in ("layers", "losses"):
    picture = (converted / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert f"]({name}.png)" in text
  with (converted / "results.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  # Two layers, four maps, two heads and both together.
  assert len(rows) == 2 * 4 * 3
  assert not list(converted.glob(".*"))


@pytest.mark.slow
def test_the_result_is_a_run(converted, capsys):
  record = json.loads((converted / "linearize.json").read_text())
  found = evaluate(converted, split="dev")
  verdict = record["models"]["conversion"]
  assert found["step"] == 0
  assert found["accuracy"] == pytest.approx(verdict["accuracy"], abs=1e-6)
  assert found["loss"] == pytest.approx(verdict["loss"], rel=1e-5)
  assert evaluate(converted)["accuracy"] == pytest.approx(
    json.loads((converted / "metrics.jsonl").read_text())["test/accuracy"]
  )
  ids = converted.parent / "ids.txt"
  ids.write_text(" ".join(["3"] * 64))
  command = ["predict", f"--workdir={converted}", str(ids), "--batch_size=1"]
  assert train_main(command) == 0
  assert json.loads(capsys.readouterr().out)["label"] in range(10)


@pytest.mark.slow
def test_fine_tuning_starts_from_the_conversion(converted):
  config = run_folder.stored_config(converted)
  config.model.init_from = str(converted)
  config.model.init_head = True
  stored = json.loads((converted / "config.json").read_text())
  state, _ = pretrained.start_from(
    first_state(config, **stored["data"]["train"]), config
  )
  variables = nn.load_pretrained(converted).variables
  jax.tree.map(np.testing.assert_array_equal, dict(state.variables), variables)


@pytest.mark.slow
def test_a_killed_command_goes_on(converted, convert, tmp_path):
  out = shutil.copytree(converted, tmp_path / "out")
  read = lambda: {p.name: p.read_bytes() for p in out.glob("layers/*")}
  whole = read()
  first = out / "layers" / "layer_0.npz"
  made = first.stat().st_mtime_ns
  (out / "layers" / "layer_1.npz").unlink()
  (out / "report.md").unlink()
  assert convert(out) == 0
  assert first.stat().st_mtime_ns == made
  assert whole == read()
  assert (out / "report.md").exists()


@pytest.mark.slow
def test_other_settings_are_refused(converted, convert, capsys):
  assert convert(converted, "--seed=1") == 2
  error = capsys.readouterr().err
  assert "layer_0.npz' was fitted with" in error and "--overwrite" in error


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((), "one of --workdir and --inputs is needed"),
    (("--workdir=/no",), "'/no' is no workdir"),
    (("--inputs=/no",), "--inputs: there is no file '/no'"),
    (("--workdir=/no", "--causal"), "--causal is for --inputs only"),
    (("--workdir=/no", "--pair=oprf-orf"), "no parameters.*steps=0"),
    (
      ("--workdir=/no", "--pair=trigrf-fastfood_learnable"),
      "negative features",
    ),
    (
      ("--workdir=/no", "--pair=oprf-fastfood_learnable"),
      "needs statistics of its inputs",
    ),
    (("--workdir=/no", "--rows=0"), "--rows must be"),
    (
      ("--workdir=/no", "--learning_rate=0"),
      "--learning_rate must be positive",
    ),
  ],
)
def test_mistakes_without_a_run(flags, message, tmp_path, capsys):
  assert main([f"--out={tmp_path / 'out'}", *flags]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert re.search(message, error), error
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mistakes_with_a_run(run, convert, tmp_path, capsys):
  folder, _, _ = run
  new = tmp_path / "out"
  for out, flags, message in (
    (new, ["--held_out=5000"], "--held_out must be at most the 181"),
    (new, ["--examples=5000"], "--examples must be at most the 1465"),
    (new, ["--step=5"], "no checkpoint of step '5'"),
    (new, ["--window=-1"], "--window must be"),
    (folder, [], "is the workdir of a run of train.py"),
  ):
    assert convert(out, *flags) == 2
    assert message in capsys.readouterr().err
  assert not new.exists()


@pytest.mark.parametrize(
  ("attention", "message"),
  [
    ("spectral", "is linear already: its config.model.attention is 'spectral'"),
    ("linformer", "has no softmax to copy: its config.model.attention"),
  ],
)
def test_runs_without_exact_attention(attention, message, tmp_path, capsys):
  config = default_config()
  config.model.attention = attention
  stored = {"config": run_folder.to_dict(config), "data": {"train": {"x": {}}}}
  stored["environments"] = [{}]
  (tmp_path / "config.json").write_text(json.dumps(stored))
  out = tmp_path / "out"
  assert main([f"--workdir={tmp_path}", f"--out={out}"]) == 2
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_loss_that_is_never_finite(convert, tmp_path, monkeypatch, capsys):
  def fail(*args, **kwargs):
    raise NonFiniteLossError("layer 'layer_0': the loss is not finite")

  monkeypatch.setattr(command, "fit_layers", fail)
  assert convert(tmp_path) == 3
  assert capsys.readouterr().err.startswith("error: layer 'layer_0'")


def make_file(path, groups=1):
  """Writes five sequences of two layers, with `groups` queries a key head."""
  sizes = {"batch": 5, "length": 6, "num_heads": 2, "head_dim": 4}
  layers = [
    dataclasses.replace(
      inputs.random_inputs(**sizes, seed=seed), name=f"layer_{seed}"
    )
    for seed in range(2)
  ]
  repeated = [np.repeat(layer.query, groups, axis=2) for layer in layers]
  layers = [
    dataclasses.replace(layer, query=query)
    for layer, query in zip(layers, repeated, strict=True)
  ]
  inputs.write_npz(path, layers)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 3])
def test_a_file_gives_layers_and_no_model(groups, tmp_path):
  make_file(tmp_path / "x.npz", groups)
  flags = ["--num_features=4", "--steps=2", "--causal"]
  out = tmp_path / "out"
  assert main([f"--inputs={tmp_path / 'x.npz'}", f"--out={out}", *flags]) == 0
  assert sorted(path.name for path in out.iterdir()) == [
    "layers",
    "layers.png",
    "linearize.json",
    "losses.png",
    "report.md",
    "results.csv",
  ]
  record = json.loads((out / "linearize.json").read_text())
  assert record["is_causal"] and record["source"] is None
  with (out / "results.csv").open(newline="") as file:
    heads = {row["head"] for row in csv.DictReader(file)}
  assert len(heads) == 1 + 2 * groups
  text = (out / "report.md").read_text()
  assert "4 sequences of 6 positions to fit on, 1 others" in text
  assert "## The model" not in text


def test_a_file_with_too_few_sequences(tmp_path, capsys):
  make_file(tmp_path / "x.npz")
  flags = ["--held_out=2", "--examples=4"]
  command = [f"--inputs={tmp_path / 'x.npz'}", f"--out={tmp_path / 'y'}"]
  assert main([*command, *flags]) == 2
  assert re.search(r"holds 5 sequences, .*, 4 \+ 2", capsys.readouterr().err)


@pytest.mark.slow
def test_a_gaussian_teacher_and_a_masked_objective(tmp_path_factory, run):
  tokens = run[1].task.cache_dir
  for changes in (
    {"model.attention": "gaussian"},
    {"train.objective": "masked"},
    {"train.objective": "causal"},
  ):
    folder = tmp_path_factory.mktemp("other")
    write_run(folder / "run", run_config(tokens, **changes))
    out = folder / "out"
    flags = ["--num_features=4", "--steps=2", "--examples=4", "--held_out=2"]
    assert main([f"--workdir={folder / 'run'}", f"--out={out}", *flags]) == 0
    record = json.loads((out / "linearize.json").read_text())
    is_causal = changes.get("train.objective") == "causal"
    assert record["is_causal"] == is_causal
    found = evaluate(out, split="dev")["loss"]
    expected = record["models"]["conversion"]["loss"]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_exact_keys(convert, tmp_path):
  out = tmp_path / "hybrid"
  assert convert(out, "--window=3", "--num_heavy=2", "--num_sinks=1") == 0
  model = nn.load_pretrained(out).model
  assert (model.window, model.num_sinks, model.num_heavy) == ((3, 3), 1, 2)
  assert (
    "window 3 and 3, 1 sinks, 2 heavy keys" in (out / "report.md").read_text()
  )


@pytest.mark.slow
def test_a_map_without_parameters_is_measured_as_it_is(convert, tmp_path):
  out = tmp_path / "as_it_is"
  assert convert(out, "--pair=posrf-orf", "--steps=0", "--num_features=8") == 0
  assert not (out / "losses.png").exists()
  record = json.loads((out / "linearize.json").read_text())
  assert record["pair"] == "posrf-orf" and len(record["layers"]) == 2
