"""What goes wrong in a long run: signals, kills, full disks, NaN, two runs."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from absl import logging

from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.run import describe, report
from spectraformer_jax.train.run.lock import workdir_lock
from spectraformer_jax.train.run.meters import RUN_AHEAD, Record
from spectraformer_jax.train.run.nonfinite import NonFiniteError, SkippedSteps
from spectraformer_jax.train.run.selection import is_better
from spectraformer_jax.train.run.signals import StopSignals
from spectraformer_jax.train.run.writers import read_rows
from spectraformer_jax.train.step.steps import Sums
from tests.train import workers
from tests.train.helpers import (
  ROOT,
  TINY,
  as_flags,
  broken_reads,
  run_python,
  same_arrays,
  saved_arrays,
  start_python,
  without_times,
)

TRAIN = str(ROOT / "train.py")


def train_with(action, at_step, config, workdir, monkeypatch):
  """Trains with `action(batch)` before that step."""
  with monkeypatch.context() as patch:
    patch.setattr(
      parallel.DataParallelStep,
      "__call__",
      workers.before_step(at_step, action),
    )
    return train_and_evaluate(config, workdir)


def checkpoint_steps(workdir):
  folders = (workdir / "checkpoints").iterdir()
  return sorted(int(path.name) for path in folders if path.name.isdigit())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.slow
def test_signal_saves_the_step_under_way(
  name, uninterrupted, tiny_config, tmp_path, monkeypatch
):
  send = lambda batch: os.kill(os.getpid(), signal.Signals[name])
  handler = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt, match=name):
    train_with(send, 21, tiny_config(), tmp_path, monkeypatch)
  assert signal.getsignal(signal.SIGTERM) is handler
  # 21 is in the middle of a row of metrics, and no step to save at.
  assert checkpoint_steps(tmp_path)[-1] == 21
  train_and_evaluate(tiny_config(), tmp_path)
  same_arrays(saved_arrays(tmp_path, 48), saved_arrays(uninterrupted[0], 48))
  assert without_times(read_rows(tmp_path)) == without_times(
    read_rows(uninterrupted[0])
  )


def test_second_ctrl_c_does_not_wait(monkeypatch):
  clock = [10.0]
  monkeypatch.setattr(time, "monotonic", lambda: clock[0])
  with pytest.raises(KeyboardInterrupt):
    with StopSignals() as signals:
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)  # the same press, passed on
      clock[0] += 5
      os.kill(os.getpid(), signal.SIGTERM)
      assert signals.received == "SIGINT"
      os.kill(os.getpid(), signal.SIGINT)
      pytest.fail("the second one should not get here")


def test_no_handlers_outside_of_the_main_thread():
  seen = []

  def run():
    with StopSignals():
      seen.append(signal.getsignal(signal.SIGTERM))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.slow
def test_train_py_exits_with_the_resumable_status(cache_dir, tmp_path):
  values = TINY | {
    "task.cache_dir": cache_dir,
    "train.num_steps": 100_000,
    "checkpoint.every": 100_000,
  }
  flags = as_flags(values)
  with start_python(TRAIN, f"--workdir={tmp_path}", *flags) as process:
    deadline = time.monotonic() + 120
    while not read_rows(tmp_path):
      assert process.poll() is None, process.communicate()
      assert time.monotonic() < deadline
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
  assert process.returncode == 75, err
  (step,) = re.findall(r"SIGTERM: stops; step (\d+) is saved", err)
  assert checkpoint_steps(tmp_path)[-1] == int(step)
  assert "the same command goes on from here" in err


@broken_reads
@pytest.mark.slow
def test_damaged_checkpoint_falls_back(
  uninterrupted, tiny_config, tmp_path, monkeypatch
):
  stop = lambda batch: os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(KeyboardInterrupt):
    train_with(stop, 45, tiny_config(), tmp_path, monkeypatch)
  assert checkpoint_steps(tmp_path)[-2:] == [36, 45]
  for path in (tmp_path / "checkpoints" / "45" / "state").rglob("d/*"):
    path.write_bytes(b"\0" * path.stat().st_size)
  lines = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *a: lines.append(text % a)
  )
  train_and_evaluate(tiny_config(), tmp_path)
  assert sum("going on from step 36" in line for line in lines) == 1
  same_arrays(saved_arrays(tmp_path, 48), saved_arrays(uninterrupted[0], 48))
  assert without_times(read_rows(tmp_path)) == without_times(
    read_rows(uninterrupted[0])
  )


# A disk of 2 MiB that is later made larger; $0 is the folder, $@ the command.
SMALL_DISK = """
mount -t tmpfs -o size=2m tmpfs "$0" || exit 99
"$@"; echo "first $?"
ls "$0/run/checkpoints"
mount -o remount,size=64m "$0"
"$@"; echo "second $?"
"""
IN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def can_mount():
  if not shutil.which("unshare"):
    return False
  command = [*IN_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
  return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs user namespaces")
@pytest.mark.slow
def test_full_disk(cache_dir, tmp_path):
  values = TINY | {
    "task.cache_dir": cache_dir,
    "checkpoint.every": 1,
    "checkpoint.keep": 100,
  }
  command = [TRAIN, f"--workdir={tmp_path}/run", *as_flags(values)]
  done = subprocess.run(
    [*IN_NAMESPACE, "sh", "-c", SMALL_DISK]
    + [str(tmp_path), sys.executable, *command],
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=120,
  )
  first, _, rest = done.stdout.partition("first 74\n")
  assert first == "" and rest, (done.stdout, done.stderr)
  kept = [int(line) for line in rest.splitlines() if line.isdigit()]
  (failed,) = re.findall(
    r"error: .*step (\d+) could not be written", done.stderr
  )
  assert kept and max(kept) == int(failed) - 1
  assert f"resumes at step {max(kept)}" in done.stderr
  assert "second 0" in rest


def test_batch_that_is_not_finite_is_skipped(
  tiny_config, tmp_path, monkeypatch
):
  def spoil(batch):
    batch["weight"][3] = np.nan

  config = tiny_config(**{"train.num_steps": 24})
  train_with(spoil, 11, config, tmp_path, monkeypatch)
  rows = [row for row in read_rows(tmp_path) if "train/loss" in row]
  assert [row["train/skipped_steps"] for row in rows] == [0, 1, 1]
  assert all(np.isfinite(row["train/loss"]) for row in rows)
  arrays = saved_arrays(tmp_path, 24)
  assert all(np.isfinite(array).all() for array in arrays.values())
  counts = {int(v) for k, v in arrays.items() if k.endswith("['count']")}
  assert arrays["['step']"] == 24 and counts == {23}


@pytest.mark.slow
def test_run_that_diverges_stops_with_a_report(tiny_config, tmp_path):
  config = tiny_config(
    **{"optim.lr": 1e38, "train.max_skipped_steps": 5, "checkpoint.every": 1}
  )
  with pytest.raises(NonFiniteError, match="in 5 steps in a row") as error:
    train_and_evaluate(config, tmp_path)
  (folder,) = tmp_path.glob("nonfinite-step-*")
  assert f"{folder}/report.md" in str(error.value)
  last_finite = int(folder.name.split("-")[-1]) - 5
  assert 1 <= last_finite <= 5
  text = (folder / "report.md").read_text()
  rows = [line for line in text.splitlines() if "query/kernel" in line]
  assert rows and "nan" in text and "token_embedding" in text
  with np.load(folder / "batch.npz") as batch:
    assert batch["tokens"].shape == (32, 64) and batch["weight"].sum() == 32


def refuse(name):
  raise AssertionError(f"{name} is no JSON")


def test_a_run_that_ends_diverged_says_so(tiny_config, tmp_path, capsys):
  # Fewer steps than are too many in a row; the second is the first skipped.
  changes = {"optim.lr": 1e38, "optim.warmup_steps": 0, "optim.clip": "none"}
  config = tiny_config(**changes, **{"train.num_steps": 4, "eval.every": 2})
  result = train_and_evaluate(config, tmp_path)
  assert "diverged: the loss on the dev split is" in result["diverged"]
  assert "the last 3 steps were skipped" in result["diverged"]
  assert result["skipped_steps"] == 3
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=refuse)
  assert train_and_evaluate(config, tmp_path)["diverged"] == result["diverged"]
  report.print_summary(tmp_path)
  out = capsys.readouterr().out
  assert "diverged" in out and "skipped steps" in out
  assert "diverged" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_train_py_exits_with_the_status_of_a_diverged_run(cache_dir, tmp_path):
  values = TINY | {"task.cache_dir": cache_dir, "train.num_steps": 6}
  command = [TRAIN, f"--workdir={tmp_path}", *as_flags(values)]
  command += ["--config.optim.lr=1e38", "--config.optim.clip=none"]
  for _ in range(2):  # the second prints it again
    code, out, err = run_python(*command)
    assert code == 3, err
    assert "test accuracy, best-dev parameters" in out and "diverged" in out
    assert err.splitlines()[-1].startswith("error: diverged: the loss on the")


@pytest.mark.parametrize(
  ("dev_loss", "in_a_row", "test_loss", "words"),
  [
    (1.0, 0, 1.0, None),
    (np.nan, 0, 1.0, "dev split is nan after step 3"),
    (1.0, 2, 1.0, "the last 2 steps were skipped"),
    (1.0, 0, np.inf, "test split is inf after step 3"),
    (np.nan, 1, np.nan, "dev split is nan.*test split is nan.*last 1 steps"),
  ],
)
def test_what_a_diverged_run_is(dev_loss, in_a_row, test_loss, words):
  record = Record({}, dev={"step": 3, "loss": dev_loss})
  # Steps that were skipped before others that were made are no end.
  record.skipped, record.skipped_in_a_row = 5, in_a_row
  found = describe.divergence(record, record.dev, {"test split": test_loss})
  assert found is None if words is None else re.search(words, found)


def test_a_loss_that_is_not_finite_is_never_the_best():
  finite = {"accuracy": 0.1, "loss": 2.0}
  for loss in (np.nan, np.inf):
    other = {"accuracy": 0.9, "loss": loss}
    assert is_better(finite, other) and not is_better(other, finite)
    assert is_better(other, None)


def test_skipped_steps_count_in_a_row():
  record = Record(data={})
  skipped = SkippedSteps(record, limit=2)
  for step, flag in enumerate([1, 0, 1, 0, 0, 1]):
    skipped.add(step, {}, Sums(0.0, 0.0, 0.0, flag))
  assert record.skipped == 0  # looked at RUN_AHEAD steps later
  skipped.collect()
  assert (record.skipped, record.skipped_in_a_row) == (3, 1)
  # The last one and the next are two in a row, across a resume.
  skipped = SkippedSteps(record, limit=2)
  skipped.add(6, {"the": "batch"}, Sums(0.0, 0.0, 0.0, 1.0))
  for step in range(RUN_AHEAD):
    assert skipped.too_many is None
    skipped.add(7 + step, {}, Sums(0.0, 0.0, 0.0, 0.0))
  assert skipped.too_many == (6, {"the": "batch"})


def test_two_runs_in_one_workdir(tiny_config, tmp_path):
  with workdir_lock(tmp_path):
    with pytest.raises(
      ValueError, match=f"in use by process {os.getpid()} on .*--workdir"
    ):
      train_and_evaluate(tiny_config(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock"]
  with workdir_lock(tmp_path):  # free again
    pass


@pytest.mark.slow
def test_twenty_kills(cache_dir, tmp_path):
  # Saving at every step takes most of the time, so most kills fall into it.
  values = TINY | {
    "task.cache_dir": cache_dir,
    "train.num_steps": 400,
    "checkpoint.every": 1,
  }
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  limit = 900  # 400 saves take five minutes on a slow, shared machine
  code, _, err = run_python(
    TRAIN, f"--workdir={whole}", *as_flags(values), timeout=limit
  )
  assert code == 0, err
  moments = random.Random(0)
  command = [TRAIN, f"--workdir={killed}", *as_flags(values)]
  is_saving = lambda: any((killed / "checkpoints").glob("*tmp*"))
  kills = while_saving = 0
  while kills < 20:
    with start_python(*command) as process:
      for line in process.stderr:
        if "workdir: " in line:
          break
      if kills % 2:
        # A moment within a save, however slow the machine is.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not is_saving():
          pass
      else:
        time.sleep(moments.uniform(0.0, 1.5))
    assert process.returncode == -signal.SIGKILL  # it had not finished
    kills += 1
    while_saving += is_saving()
  code, _, err = run_python(*command, timeout=limit)
  assert code == 0, err
  assert while_saving > 0
  assert "damaged" not in err and not (killed / "damaged_checkpoints").exists()
  same_arrays(saved_arrays(killed, 400), saved_arrays(whole, 400))
  assert without_times(read_rows(killed)) == without_times(read_rows(whole))
