"""Cells are run, skipped, resumed, reported: here and on Dask's workers."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from spectraformer_jax import commands
from spectraformer_jax.study.sweep import cells as spec
from spectraformer_jax.study.sweep import execute
from spectraformer_jax.study.sweep.board import Board
from spectraformer_jax.study.sweep.cells import Sweep, expand
from spectraformer_jax.study.sweep.execute import (
  dask_workers,
  run_cells,
  threads,
)
from spectraformer_jax.train.run.lock import workdir_lock
from spectraformer_jax.train.run.writers import read_rows, result_row
from tests.train.helpers import ROOT, TINY, run_python, start_python

DIGITS = {"digits": "configs/digits.py"}

RESULT = {
  "step": 48,
  "test/accuracy": 0.5,
  "dev/accuracy_best": 0.5,
  "train_seconds": 10.0,
  "compile_seconds": 2.0,
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def name_of(workdir):
  return "/".join(workdir.parts[-3:])


def fake(started, broken=()):
  """Commands of processes that have a result at once, or fail."""

  def command(workdir, cpus):
    started.append((name_of(workdir), cpus))
    if workdir.parts[-2] in broken:
      code = "print('Traceback\\nValueError: too bad\\n'); raise SystemExit(3)"
      return [sys.executable, "-S", "-c", code]
    (workdir / "metrics.jsonl").write_text(json.dumps(RESULT) + "\n")
    return [sys.executable, "-S", "-c", ""]

  return command


def three_cells():
  return expand(Sweep(DIGITS, ["softmax", "oprf-orf", "local"]))


@pytest.mark.parametrize(
  ("overrides", "words"),
  [
    ({"optim.lrr": 1.0}, "Unknown config key 'optim.lrr'"),
    ({"optim.lr": "fast"}, "config.optim.lr='fast'"),
    ({"optim.lr": -1.0}, "config.optim.lr must be positive"),
  ],
)
def test_a_wrong_override_fails_its_cell_before_it_starts(
  overrides, words, tmp_path
):
  started = []
  cells = expand(Sweep(DIGITS, ["softmax"], overrides=overrides))
  failed = run_cells(cells, tmp_path, threads(1, fake(started)), live=False)
  assert words in failed["digits/softmax/seed0"]
  assert started == []


def test_a_failing_cell_is_reported_and_does_not_stop_the_rest(
  tmp_path, capsys
):
  started = []
  workers = threads(1, fake(started, broken=("oprf-orf",)))
  failed = run_cells(three_cells(), tmp_path, workers)
  assert [name for name, _ in started] == [c.name for c in three_cells()]
  assert failed == {"digits/oprf-orf/seed0": "status 3: ValueError: too bad"}
  err = capsys.readouterr().err
  assert "digits/oprf-orf/seed0: FAILED" in err
  assert "2 finished, 0 running, 0 waiting, 1 failed" in err


def test_finished_cells_are_skipped_and_failed_ones_tried_again(tmp_path):
  workers = threads(1, fake([], broken=("oprf-orf",)))
  run_cells(three_cells(), tmp_path, workers, live=False)
  started = []
  workers = threads(1, fake(started))
  failed = run_cells(three_cells(), tmp_path, workers, live=False)
  assert not failed
  assert [name for name, _ in started] == ["digits/oprf-orf/seed0"]


def test_a_finished_cell_of_another_config_is_not_taken_for_this_one(tmp_path):
  cell = three_cells()[0]
  other = expand(Sweep(DIGITS, ["softmax"], overrides={"optim.lr": 0.5}))[0]
  workdir = tmp_path / cell.name
  workdir.mkdir(parents=True)
  (workdir / "config.json").write_text(
    json.dumps({"config": json.loads(cell.config().to_json_best_effort())})
  )
  (workdir / "metrics.jsonl").write_text(json.dumps(RESULT) + "\n")
  started = []
  run = lambda cell: run_cells(
    [cell], tmp_path, threads(1, fake(started)), live=False
  )
  assert not run(cell)
  assert "config.optim.lr is 0.002 there and 0.5" in run(other)[other.name]
  assert started == []


def test_jobs_run_side_by_side_on_their_own_cores(tmp_path):
  both = threading.Barrier(2, timeout=60)

  def command(workdir, cpus):
    if "local" not in workdir.parts:  # the first two wait for each other
      both.wait()
    return fake(started)(workdir, cpus)

  started = []
  workers = threads(2, command)
  assert not run_cells(three_cells(), tmp_path, workers, jobs=2, live=False)
  assert len(started) == 3
  shares = {execute.share_of_cpus(slot, 2) for slot in range(2)}
  assert {cpus for _, cpus in started} <= shares
  assert all(shares)
  assert execute.share_of_cpus(0, 1) == ""


@pytest.mark.parametrize("finished", [False, True])
def test_a_cell_of_another_process_is_waited_for(finished, tmp_path, capsys):
  names = [cell.name for cell in three_cells()]
  elsewhere = tmp_path / names[0]
  held = contextlib.ExitStack()
  held.enter_context(workdir_lock(elsewhere))

  def command(workdir, cpus):
    if name_of(workdir) == names[2]:  # the last that is free: the other ends
      if finished:
        (elsewhere / "metrics.jsonl").write_text(json.dumps(RESULT) + "\n")
      held.close()
    return fake(started)(workdir, cpus)

  started = []
  workers = threads(1, command)
  assert not run_cells(three_cells(), tmp_path, workers, live=False)
  assert [n for n, _ in started] == names[1:] + names[: not finished]
  err = capsys.readouterr().err
  assert err.count(f"{names[0]}: another process runs it") == 1


# A cell that records its worker's process id, and ends once a worker was
# killed: with its result if that was another worker, without if it was its own.
WAITING_CELL = """
import fcntl, os, pathlib, sys, threading, time
workdir, killed, result = sys.argv[1:]
os.chdir(workdir)
lock = open(".lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
watch = lambda: (sys.stdin.read(), os._exit(1))
threading.Thread(target=watch, daemon=True).start()
worker = str(os.getppid())
with open("workers", "a") as file:
  file.write(worker + " ")
deadline = time.monotonic() + 300
while time.monotonic() < deadline:
  path = pathlib.Path(killed)
  if path.exists() and path.read_text() not in ("", worker):
    pathlib.Path("metrics.jsonl").write_text(result + "\\n")
    os._exit(0)
  time.sleep(0.05)
os._exit(2)
"""


def waiting_command(workdir, cpus):
  killed = workdir.parents[2] / "killed"
  code = [sys.executable, "-S", "-c", WAITING_CELL]
  return [*code, workdir, killed, json.dumps(RESULT)]


def test_a_killed_dask_worker_loses_nothing(tmp_path):
  distributed = pytest.importorskip("distributed")
  cells = expand(Sweep(DIGITS, ["softmax", "local"], seeds=(0, 1)))
  victims = []

  def kill_the_worker_of_the_first_cell():
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not victims:
      time.sleep(0.05)
      for path in tmp_path.glob("*/*/*/workers"):
        if path.read_text().endswith(" "):  # written to the end
          victims.append((name_of(path.parent), path.read_text().strip()))
          break
    os.kill(int(victims[0][1]), signal.SIGKILL)
    (tmp_path / "killed").write_text(victims[0][1])

  with distributed.LocalCluster(
    n_workers=2, threads_per_worker=1, dashboard_address=None
  ) as cluster:
    killer = threading.Thread(target=kill_the_worker_of_the_first_cell)
    killer.start()
    workers = dask_workers(cluster.scheduler_address, waiting_command)
    assert run_cells(cells, tmp_path, workers, jobs=2, live=False) == {}
    killer.join()
  starts = {
    cell.name: len((tmp_path / cell.name / "workers").read_text().split())
    for cell in cells
  }
  assert starts == {cell.name: 1 for cell in cells} | {victims[0][0]: 2}
  for cell in cells:
    assert result_row(read_rows(tmp_path / cell.name)) == RESULT


def test_dask_is_asked_for_in_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "distributed", None)
  with pytest.raises(ValueError, match=r"pip install 'spectraformer_jax\[dask"):
    run_cells(three_cells(), tmp_path, dask_workers("127.0.0.1:1"), live=False)


def test_a_cell_ends_with_its_sweep_however_that_ends():
  cell = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "import time; from spectraformer_jax.study.sweep import run_cell as r; "
      "r.stop_with_the_sweep(); print('up', flush=True); time.sleep(60)",
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  assert cell.stdout.readline() == b"up\n"
  assert cell.poll() is None
  cell.stdin.close()  # as the kernel does when the sweep is killed
  assert cell.wait(timeout=10) == -signal.SIGTERM
  cell.stdout.close()


def test_the_time_left_is_that_of_the_task_shared_by_the_jobs(tmp_path):
  cells = expand(
    Sweep(
      {**DIGITS, "lists": "configs/listops.py:quick"},
      ["softmax", "gaussian", "local"],
    )
  )
  board = Board(cells, tmp_path, jobs=2, live=False)
  assert board.seconds_left() is None
  board.skip(cells[0], RESULT)
  assert board.seconds_left() == pytest.approx(5 * 12 / 2)
  board.skip(cells[3], RESULT | {"train_seconds": 98.0})
  # Two of 12 s and two of 100 s remain.
  assert board.seconds_left() == pytest.approx((2 * 12 + 2 * 100) / 2)


def test_the_live_table_is_drawn(tmp_path):
  cells = three_cells()
  board = Board(cells, tmp_path, jobs=1, live=True)
  board._live.console.file = out = io.StringIO()
  with board:
    board.skip(cells[0], RESULT)
    board.fail(cells[1], "status 1: bad")
    board.start(cells[2])
  text = out.getvalue()
  assert "finished" in text and "failed: status 1: bad" in text
  assert "1 finished, 1 running, 0 waiting, 1 failed, ETA" in text


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_finishes(tmp_path):
  """Real cells: one killed in training, one that cannot be built."""
  tiny = {k: v for k, v in TINY.items() if k != "task.name"}
  tiny |= {"train.num_steps": 300, "checkpoint.every": 20, "eval.every": 100}
  tiny |= {"task.cache_dir": tmp_path / "cache"}
  sets = [f"{key}={value}" for key, value in tiny.items()]
  flags = ["-m", "spectraformer_jax.study", "sweep", f"--out={tmp_path}"]
  flags += ["--tasks", "digits", "--attentions", "local", "oprf-nothing"]
  flags += ["--set", *sets]
  workdir = tmp_path / "digits/local/seed0"

  limit = 600  # of machines that others use, too
  deadline = time.monotonic() + limit
  with start_python(*flags) as process:
    while len(read_rows(workdir)) < 6 and time.monotonic() < deadline:
      time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=limit)
  assert process.returncode == commands.INTERRUPTED, err
  assert result_row(read_rows(workdir)) is None
  steps = read_rows(workdir)[-1]["step"]
  assert steps >= 40

  code, _, err = run_python(*flags, timeout=limit)
  assert code == 1, err
  assert "oprf-nothing/seed0: FAILED: status 1: error: Unknown weight" in err
  assert result_row(read_rows(workdir))["pair"] == "local"
  assert "resumes at step" in (workdir / spec.LOG).read_text()
