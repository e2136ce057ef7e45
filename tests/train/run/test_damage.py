"""Files of a workdir that were damaged or edited, and names that are wrong."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import threading

import numpy as np
import pytest
from absl import logging

from spectraformer_jax import nn
from spectraformer_jax.data import Dataset
from spectraformer_jax.train import loop, predict
from spectraformer_jax.train.__main__ import main
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.evaluate import evaluate
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.run import run_folder
from spectraformer_jax.train.run.checkpoints import Checkpointer
from spectraformer_jax.train.run.lock import LOCK, in_use, workdir_lock
from spectraformer_jax.train.run.writers import MetricWriter, read_rows
from spectraformer_jax.train.step import objectives
from tests.train.helpers import broken_reads, make_state, save, start_python


@pytest.fixture
def copy(uninterrupted, tmp_path):
  """A copy of the finished run to spoil."""
  return shutil.copytree(uninterrupted[0], tmp_path / "copy")


@pytest.fixture
def log(monkeypatch):
  """What is logged: warnings, and what is only said."""
  lines = {"warning": [], "info": []}
  for name, kept in lines.items():
    monkeypatch.setattr(
      logging,
      name,
      lambda text, *args, kept=kept: kept.append(text % args if args else text),
    )
  return lines


def one_line(call, *words):
  """The message of the ValueError that `call` ends in."""
  with pytest.raises(ValueError) as error:
    call()
  message = str(error.value)
  assert "\n" not in message
  for word in words:
    assert word in message, message
  return message


# Lines of metrics.jsonl that are no rows, and what is said of them.
BAD_LINES = {
  b"": "blank",
  b"  \t": "blank",
  b'{"step": 3, "train/lo': "line 1 column",
  b"5": "holds int",
  b"null": "holds NoneType",
  b"[1, 2]": "holds list",
  b"{}": "its step",
  b'{"step": "3"}': "its step",
  b'{"step": true}': "its step",
  b'{"step": -1}': "its step",
  b'{"step": 3, "train/loss": "low"}': "'train/loss' must be a number",
  b'{"step": 3, "dev/loss": null}': "'dev/loss' must be a number",
  b'\xff\xfe{"step": 3}': "utf-8",
  b"\0" * 30: "line 1 column",
  b"[" * 100_000: "nested",
  b"9" * 5000: "limit",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:12])
def test_one_bad_line_costs_no_row(line, tmp_path, log):
  rows = [{"step": i, "train/loss": float(i), "time": 0.0} for i in range(6)]
  lines = [json.dumps(row).encode() for row in rows]
  content = b"\n".join([*lines[:3], line, *lines[3:]]) + b"\n"
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(content)
  for _ in range(3):
    assert read_rows(tmp_path) == rows
  (said,) = log["warning"]
  assert f"line 4 of {path}" in said and BAD_LINES[line] in said
  with MetricWriter(tmp_path, start_step=4, tensorboard=False) as writer:
    writer.write(5, {"train/loss": 5.0})
  assert [row["step"] for row in read_rows(tmp_path)] == list(range(6))
  (aside,) = tmp_path.glob("metrics.jsonl.*")
  assert aside.read_bytes() == content
  assert str(aside) in log["warning"][-1] and len(log["warning"]) == 2
  (dropped,) = log["info"]
  assert "1 rows that are not of the first 4 steps" in dropped


def test_copies_of_damaged_metrics_do_not_replace_each_other(tmp_path, log):
  for number in range(3):
    (tmp_path / "metrics.jsonl").write_text(f"{number}\n")
    with MetricWriter(tmp_path, start_step=0, tensorboard=False):
      pass
  found = sorted(tmp_path.glob("metrics.jsonl.*"))
  assert [path.read_text() for path in found] == ["0\n", "1\n", "2\n"]


def test_a_byte_order_mark_and_windows_ends_are_no_damage(tmp_path, log):
  content = b'\xef\xbb\xbf{"step": 1}\r\n{"step": 2}\r\n{"step": 3}'
  (tmp_path / "metrics.jsonl").write_bytes(content)
  assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
  assert not log["warning"]


@pytest.mark.parametrize(
  ("end", "is_damage"),
  [(b'{"st', 0), (b'{"step": 7, "train/lo', 0), (b"garbage", 1), (b"[7]", 1)],
)
def test_a_last_line_that_a_kill_cut_is_no_damage(
  end, is_damage, tmp_path, log
):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + end)
  assert [row["step"] for row in read_rows(tmp_path)] == [1]
  with MetricWriter(tmp_path, start_step=1, tensorboard=False):
    pass
  assert len(log["warning"]) == 2 * is_damage
  assert len(list(tmp_path.glob("metrics.jsonl.*"))) == is_damage


@pytest.mark.parametrize("content", [None, b""])
def test_lost_rows_are_told(content, tmp_path, log):
  if content is not None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
  options = {"tensorboard": False, "first_row": 10}
  with MetricWriter(tmp_path, start_step=9, **options):
    assert not log["warning"]  # none was due yet
  with MetricWriter(tmp_path, start_step=10, **options):
    (said,) = log["warning"]
  assert "has no rows of the first 10 steps" in said


def test_numbers_that_are_not_finite_are_json(tmp_path):
  values = {"dev/loss": math.nan, "train/loss": math.inf}
  values |= {"baselines": {"a": -math.inf}, "note": "NaN of the text"}
  with MetricWriter(tmp_path, start_step=0, tensorboard=False) as writer:
    writer.write(1, values)
  path = tmp_path / "metrics.jsonl"

  def refuse(name):
    raise AssertionError(f"{name} is no JSON")

  json.loads(path.read_text(), parse_constant=refuse)
  # What older versions wrote.
  old = '{"step": 2, "dev/loss": NaN, "train/loss": Infinity}\n'
  path.write_text(path.read_text() + old)
  new, old = read_rows(tmp_path)
  assert math.isnan(new["dev/loss"]) and math.isnan(old["dev/loss"])
  assert new["train/loss"] == old["train/loss"] == math.inf
  assert new["baselines"]["a"] == -math.inf
  assert new["note"] == "NaN of the text"


CONFIGS = {
  "empty": "",
  "cut": '{"config": {"task',
  "{}": "{}",
  "[]": "[]",
  "5": "5",
  "no data": '{"config": {}, "environments": [{}]}',
  "data is a list": '{"config": {}, "data": [], "environments": [{}]}',
  "no environments": '{"config": {}, "data": {"train": {}}}',
  "config is text": '{"config": "", "data": {"train": {}}}',
  "nested": "[" * 100_000,
  "not UTF-8": b'{"config": "\xff\xff"}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_config_json(name, copy, tiny_config, capsys):
  content = CONFIGS[name]
  content = content if isinstance(content, bytes) else content.encode()
  path = copy / "config.json"
  path.write_bytes(content)
  for call in (
    lambda: evaluate(copy),
    lambda: nn.load_pretrained(copy),
    lambda: train_and_evaluate(tiny_config(), copy),
  ):
    one_line(call, str(copy))
  if not name.startswith(("no ", "data")):
    one_line(lambda: run_folder.read_config(copy), str(path), "is damaged")
  assert path.read_bytes() == content
  assert main(["predict", f"--workdir={copy}"]) == 2
  assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("section", ["task", "train", "optim", "feature_map"])
def test_a_config_without_a_section_or_with_another(
  section, copy, tiny_config, tmp_path
):
  stored = json.loads((copy / "config.json").read_text())
  for value in (None, 5, "x", []):
    stored["config"][section] = value
    (copy / "config.json").write_text(json.dumps(stored))
    one_line(lambda: evaluate(copy), "config.json")
    one_line(lambda: train_and_evaluate(tiny_config(), copy), section)
    if section in ("task", "train", "feature_map"):
      one_line(lambda: nn.load_pretrained(copy), "config.json")


def test_an_edited_result_is_told_and_can_be_made_again(
  copy, tiny_config, uninterrupted, monkeypatch
):
  path = copy / "metrics.jsonl"
  *lines, last = path.read_text().splitlines()
  result = json.loads(last)
  for row in (
    {"step": 48, "test/accuracy": 0.5},
    result | {"pair": 5},
    result | {"baselines": []},
    result | {"train_seconds": "long"},
  ):
    path.write_text("\n".join([*lines, json.dumps(row)]) + "\n")
    call = lambda: train_and_evaluate(tiny_config(), copy)
    one_line(call, str(path), "delete the row")


def test_a_finished_run_in_a_folder_for_reading_alone(
  uninterrupted, tiny_config, monkeypatch, log
):
  def refuse(*args):
    raise PermissionError(13, "Permission denied", "report.md")

  monkeypatch.setattr(run_folder, "write_text", refuse)
  monkeypatch.setattr(parallel.DataParallelStep, "__call__", None)
  workdir, result = uninterrupted
  assert train_and_evaluate(tiny_config(), workdir) == result
  assert "The report is not written again" in log["warning"][-1]


@broken_reads
def test_a_checkpoint_of_another_step_is_set_aside(tmp_path, log):
  directory = tmp_path / "checkpoints"
  with Checkpointer(directory, keep=3) as checkpointer:
    save(checkpointer, 10)
  shutil.copytree(directory / "10", directory / "15")
  with Checkpointer(directory, keep=3) as checkpointer:
    state, record = checkpointer.restore_latest(make_state(0))
    assert state.step == 10 and record == {"note": 10}
    assert checkpointer.steps() == [10]
    save(checkpointer, 15)
  assert "it is that of step 10" in log["warning"][0]
  aside = tmp_path / "damaged_checkpoints"
  (aside / "15" / "mine").touch()
  # The next one does not take the place of the first.
  (directory / "15" / "record" / "metadata").write_text("")
  with Checkpointer(directory, keep=3) as checkpointer:
    assert checkpointer.restore_latest(make_state(0))[0].step == 10
  assert (aside / "15" / "mine").exists() and (aside / "15-2").exists()


@broken_reads
@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("model.embed_dim", 0),
    ("model.embed_dim", "wide"),
    ("model.num_heads", 0),
    ("feature_map.component", "opfr"),
    ("feature_map.num_features", None),
    ("model.dropout_rate", "some"),
  ],
)
def test_an_edited_value_of_config_json(key, value, copy):
  stored = json.loads((copy / "config.json").read_text())
  section, name = key.split(".")
  stored["config"][section][name] = value
  (copy / "config.json").write_text(json.dumps(stored))
  if key != "model.dropout_rate":  # without effect
    one_line(lambda: nn.load_pretrained(copy), "config.json")
  if key != "feature_map.component" and value is not None:
    one_line(lambda: evaluate(copy), "config.json", name)


def spoil_record(folder):
  (folder / "record" / "metadata").write_text('{"be')


def without_best(folder):
  (folder / "record" / "metadata").write_text("{}")


def empty(folder):
  shutil.rmtree(folder)
  folder.mkdir()


@broken_reads
@pytest.mark.parametrize("damage", [spoil_record, without_best, empty])
def test_damaged_newest_record_falls_back(damage, copy, caplog):
  newest = copy / "checkpoints" / "99"
  shutil.copytree(copy / "checkpoints" / "48", newest)
  damage(newest)
  expected = nn.load_pretrained(copy, step=48).variables
  for step in ("best", "last"):
    caplog.clear()
    found = nn.load_pretrained(copy, step=step).variables
    for name in expected["params"]:
      assert name in found["params"]
    np.testing.assert_array_equal(
      found["params"]["head_logits"]["kernel"],
      expected["params"]["head_logits"]["kernel"],
    )
    assert "checkpoint of step 99" in caplog.text
    assert "that of step 48 instead" in caplog.text
  one_line(lambda: nn.load_pretrained(copy, step=99), "step 99", "cannot be")
  for folder in (copy / "checkpoints").iterdir():
    empty(folder)
  one_line(lambda: nn.load_pretrained(copy), "None of the checkpoints")


@broken_reads
def test_a_checkpoint_under_another_number_is_not_loaded(copy):
  shutil.copytree(copy / "checkpoints" / "48", copy / "checkpoints" / "99")
  one_line(lambda: nn.load_pretrained(copy, step="last"), "is that of step 48")


def test_two_configs_in_one_folder(
  uninterrupted, tiny_config, tmp_path, monkeypatch
):
  """Another run comes and goes while this one loads its data."""
  load, workdir = loop.load_data, tmp_path / "run"

  def load_slowly(config):
    shutil.copytree(uninterrupted[0], workdir)
    return load(config)

  monkeypatch.setattr(loop, "load_data", load_slowly)
  monkeypatch.setattr(parallel.DataParallelStep, "__call__", None)
  config = tiny_config(**{"optim.lr": 0.5})
  call = lambda: train_and_evaluate(config, workdir)
  one_line(call, "config.optim.lr is 0.005 there and 0.5 here")
  assert run_folder.stored_config(workdir).optim.lr == 0.005
  # The same run by someone else: its result is this one's.
  shutil.rmtree(workdir)
  assert train_and_evaluate(tiny_config(), workdir) == uninterrupted[1]
  # It has been stopped: its checkpoints are not this run's.
  (workdir / "metrics.jsonl").unlink()
  workdir.rename(tmp_path / "stopped")
  monkeypatch.setattr(
    loop,
    "load_data",
    lambda c: shutil.copytree(tmp_path / "stopped", workdir) and load(c),
  )
  one_line(call, "config.optim.lr is 0.005 there and 0.5 here")
  monkeypatch.setattr(loop, "load_data", load)
  (workdir / "config.json").unlink()
  one_line(call, "has checkpoints but no config.json")


HOLD = """
import sys, time
from pathlib import Path
from spectraformer_jax.train.run.lock import workdir_lock
with workdir_lock(Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


def test_the_lock_goes_with_its_process(tmp_path):
  with start_python("-c", HOLD, str(tmp_path)) as process:
    assert process.stdout.readline() == "held\n"
    assert in_use(tmp_path)
    one_line(
      lambda: contextlib.ExitStack().enter_context(workdir_lock(tmp_path)),
      f"in use by process {process.pid}",
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert (tmp_path / LOCK).exists() and not in_use(tmp_path)
  with workdir_lock(tmp_path):
    pass


def test_a_look_at_the_lock_keeps_no_run_out(tmp_path):
  with workdir_lock(tmp_path):
    pass
  with (tmp_path / LOCK).open() as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    timer = threading.Timer(0.02, fcntl.flock, (file, fcntl.LOCK_UN))
    timer.start()
    with workdir_lock(tmp_path):
      pass
    timer.join()


@pytest.mark.parametrize(
  "name", ["/dev/null", "/dev/null/run", "x" * 300, "a\0b", "file/run", "file"]
)
def test_what_can_be_no_workdir(name, tiny_config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").touch()
  monkeypatch.setattr(loop, "load_data", None)
  one_line(lambda: train_and_evaluate(tiny_config(), name), "--workdir must be")
  assert os.listdir(tmp_path) == ["file"]


def sequences(lengths, split):
  return Dataset.from_sequences(
    [[1] * n for n in lengths],
    [0] * len(lengths),
    name="toy",
    vocab_size=5,
    num_classes=2,
    length=4,
    split=split,
  )


def test_nothing_to_guess():
  good, bad = sequences([1, 2], "train"), sequences([1, 1], "dev")
  objectives.check_lengths("causal", {"train": good})
  for objective in ("masked", "classify"):
    objectives.check_lengths(objective, {"train": good, "dev": bad})
  one_line(
    lambda: objectives.check_lengths("causal", {"train": good, "dev": bad}),
    "causal",
    "longest of the dev split",
    "has 1",
  )


PIXELS = {"tokenizer": "pixels", "id_shift": 0, "length": 8, "pair": False}
PIXELS |= {"vocab_size": 17}


@pytest.mark.parametrize(
  "line, words",
  [
    ("1 " + "9" * 31, "ids must lie in [0, 17), got 999"),
    ("1 " + "9" * 5000, "ids must lie in [0, 17), got 999"),
    ("1_0", "has no text"),
    ("\u0663", "has no text"),
    ("1 -1", "ids must lie in [0, 17), got -1"),
    ("1 2\udcff", "it is not UTF-8, from character 4 on"),
  ],
)
def test_ids_that_are_none(line, words):
  one_line(lambda: predict.read_text(["1", line], PIXELS), "Line 2", words)


def test_files_to_predict(uninterrupted, tmp_path, capsys):
  workdir = f"--workdir={uninterrupted[0]}"
  np.save(tmp_path / "x.npy", np.ones((2, 3), int))
  (tmp_path / "x.npy").rename(tmp_path / "x.npz")
  assert main(["predict", workdir, str(tmp_path / "x.npz")]) == 2
  assert "a single array, an .npy" in capsys.readouterr().err
  (tmp_path / "x.txt").write_bytes(b"1 2\n1 \xff\n")
  assert main(["predict", workdir, str(tmp_path / "x.txt")]) == 2
  err = capsys.readouterr().err
  assert f"{tmp_path}/x.txt: Line 2: it is not UTF-8" in err
  probabilities = []
  for start in (b"", b"\xef\xbb\xbf"):
    (tmp_path / "x.txt").write_bytes(start + b"1 2 3\n")
    assert main(["predict", workdir, str(tmp_path / "x.txt")]) == 0
    probabilities.append(capsys.readouterr().out)
  assert probabilities[0] == probabilities[1]


def test_a_byte_order_mark_is_no_text():
  facts = PIXELS | {"tokenizer": "bytes", "id_shift": 1, "vocab_size": 257}
  plain, marked = (
    predict.read_text([x], facts)[0][0].tolist() for x in ("ab", "\ufeffab")
  )
  assert plain == marked == [98, 99]
