"""Runs of two processes on one machine, one device each.

Every wait has a limit and every process is killed at its end: a process that
waits for a collective ignores SIGTERM.
"""

import contextlib
import json
import re
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from spectraformer_jax.train.devices import hosts
from spectraformer_jax.train.run.writers import read_rows
from tests.train.helpers import (
  ROOT,
  TINY,
  as_flags,
  run_python,
  same_arrays,
  saved_arrays,
  start_python,
)

TRAIN = str(ROOT / "train.py")
# The first two are not those of train.py's default config.
SHORT = {
  "model.dropout_rate": 0.1,
  "optim.weight_decay": 0.0,
  "train.num_steps": 12,
  "feature_map.redraw_interval": 5,
}
UNUSED = Path("/dev/null/workdir")  # nothing can be made or read there


@contextlib.contextmanager
def two_processes(workdir, values):
  """Both halves of a run; they are killed in the end."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  with contextlib.ExitStack() as stack:
    yield [
      stack.enter_context(
        start_python(
          TRAIN,
          f"--workdir={workdir if number == 0 else UNUSED}",
          f"--coordinator=127.0.0.1:{port}",
          "--num_processes=2",
          f"--process_id={number}",
          "--heartbeat_seconds=10",
          *as_flags(values),
        )
      )
      for number in range(2)
    ]


def wait_for_rows(workdir, processes):
  deadline = time.monotonic() + 150
  while not read_rows(workdir):
    for process in processes:
      assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, tiny_config):
  """The same run by one process with two devices."""
  workdir = tmp_path_factory.mktemp("one")
  path = workdir / "flags.json"
  path.write_text(json.dumps(tiny_config(**SHORT).to_dict()))
  code, _, err = run_python(
    "-m",
    "tests.train.workers",
    "training",
    str(path),
    str(workdir / "run"),
    "0",
    devices=2,
  )
  assert code == 0, err
  return workdir / "run"


@pytest.mark.parametrize("engine", ["pmap", "jit"])
@pytest.mark.slow
def test_two_processes_train_like_one(engine, one_process, cache_dir, tmp_path):
  values = TINY | SHORT | {"task.cache_dir": cache_dir}
  values["train.parallel"] = engine
  with two_processes(tmp_path, values) as processes:
    for process in processes:
      _, err = process.communicate(timeout=150)
      assert process.returncode == 0, err
      assert err.index("memory of a step on each device") < err.index("dev acc")
  # Dropout and projections too: their keys go by replica and step, not by host.
  same_arrays(
    saved_arrays(tmp_path, 12), saved_arrays(one_process, 12), atol=1e-6
  )
  losses = lambda workdir: [
    row[name]
    for row in read_rows(workdir)
    for name in ("train/loss", "dev/loss", "test/loss_best")
    if name in row
  ]
  assert len(losses(tmp_path)) == 4  # rows at 8 and 12, dev, test
  np.testing.assert_allclose(losses(tmp_path), losses(one_process), rtol=1e-5)


@pytest.mark.slow
def test_one_process_dies_and_the_run_goes_on_elsewhere(cache_dir, tmp_path):
  values = TINY | {
    "task.cache_dir": cache_dir,
    "train.num_steps": 100_000,
    "checkpoint.every": 8,
  }
  with two_processes(tmp_path, values) as processes:
    wait_for_rows(tmp_path, processes)
    processes[1].kill()
    _, err = processes[0].communicate(timeout=60)
  assert processes[0].returncode == 75, err
  assert "another process of this run has gone" in err
  assert "Traceback" not in err
  # On one process, from the last checkpoint.
  flags = as_flags(values)
  with start_python(TRAIN, f"--workdir={tmp_path}", *flags) as process:
    for line in process.stderr:
      if "resumes at step" in line:
        break
  assert int(re.search(r"resumes at step (\d+)", line)[1]) % 8 == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("number", [0, 1])
def test_signal_to_one_process_stops_both(number, name, cache_dir, tmp_path):
  values = TINY | {
    "task.cache_dir": cache_dir,
    "train.num_steps": 100_000,
    "checkpoint.every": 100_000,
  }
  with two_processes(tmp_path, values) as processes:
    wait_for_rows(tmp_path, processes)
    processes[number].send_signal(signal.Signals[name])
    errors = [p.communicate(timeout=60)[1] for p in processes]
  assert [p.returncode for p in processes] == [75, 75], errors
  steps = {re.search(r"stops; step (\d+) is saved", e)[1] for e in errors}
  assert len(steps) == 1
  assert (tmp_path / "checkpoints" / steps.pop()).exists()


@pytest.mark.slow
def test_death_of_process_0(cache_dir, tmp_path):
  values = TINY | {"task.cache_dir": cache_dir, "train.num_steps": 100_000}
  with two_processes(tmp_path, values) as processes:
    wait_for_rows(tmp_path, processes)
    processes[0].kill()
    _, err = processes[1].communicate(timeout=60)
  # Its service goes with it; the runtime may end the other before we can.
  assert processes[1].returncode in (75, -signal.SIGABRT), err


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("a:1", None, None), "got no num_processes and no process_id"),
    (("a", 2, 0), "--coordinator must be host:port, got 'a'"),
    (("a:1", 2, 2), "--process_id must be from 0 to num_proc.* = 1, got 2"),
  ],
)
def test_mistakes_in_the_flags(arguments, message):
  with pytest.raises(ValueError, match=message):
    hosts.connect(*arguments)


def test_where_the_processes_come_from(monkeypatch):
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *args, **kw: calls.append(args)
  )
  monkeypatch.setattr(hosts, "_is_tpu_machine", lambda: False)
  hosts.connect()
  assert calls == []  # one process
  hosts.connect(detect=True)
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
  monkeypatch.setenv("JAX_PROCESS_ID", "3")
  hosts.connect()
  hosts.connect("other:1", 2, 0)
  assert calls == [(), ("host:1234", 4, 3), ("other:1", 2, 0)]
  monkeypatch.setenv("JAX_PROCESS_ID", "last")
  with pytest.raises(ValueError, match="JAX_PROCESS_ID must be an integer"):
    hosts.connect()
  for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
    monkeypatch.delenv(f"JAX_{name}")
  monkeypatch.setattr(hosts, "_is_tpu_machine", lambda: True)
  hosts.connect()
  assert calls[-1] == () and len(calls) == 4


@pytest.fixture
def call_in_both(monkeypatch):
  """A function that makes a call as process 0, then as process 1 of 2."""

  def call(function, *args):
    sent, outcomes = [], []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for number in range(2):
      monkeypatch.setattr(jax, "process_index", lambda number=number: number)
      monkeypatch.setattr(
        hosts,
        "_broadcast",
        lambda content, number=number: (
          sent.append(content) or content if number == 0 else sent.pop(0)
        ),
      )
      try:
        outcomes.append(function(*args))
      except ValueError as error:
        outcomes.append(str(error))
    assert not sent  # both made the same broadcasts
    return outcomes

  return call


def test_arrays_of_process_0_reach_both_bit_for_bit(call_in_both):
  tree = {"a": np.array([-0.0, np.nan], np.float32), "b": np.int32(3)}
  read = lambda: (tree, {"step": 5})
  for arrays, record in call_in_both(hosts.arrays_from_main, read, tree):
    assert record == {"step": 5} and arrays["b"] == 3
    assert np.asarray(arrays["a"]).tobytes() == tree["a"].tobytes()
  nothing = lambda: (None, None)
  outcomes = call_in_both(hosts.arrays_from_main, nothing, tree)
  assert outcomes == [(None, None)] * 2


def test_an_error_of_process_0_is_raised_in_both(call_in_both):
  def fail():
    raise ValueError("no such folder")

  assert call_in_both(hosts.from_main, fail) == ["no such folder"] * 2
  outcomes = call_in_both(hosts.arrays_from_main, fail, {})
  assert outcomes == ["no such folder"] * 2
  assert call_in_both(hosts.from_main, max, [3, 5]) == [5, 5]
