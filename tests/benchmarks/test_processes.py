"""Measured rows are kept; only what is missing runs, and failures are named."""

import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import peers, processes

ROOT = pathlib.Path(__file__).parents[2]

SCRIPT = """
import json, pathlib, sys
case = json.loads(sys.argv[2])
if case["size"] == 3:
  sys.exit("no such size")
with pathlib.Path(__file__).with_name("ran.txt").open("a") as file:
  file.write(f"{case['size']}\\n")
print("chatter")
print(json.dumps({"ms": 10 * case["size"], "version": "jax 1.0"}))
"""


@pytest.fixture
def write_module(tmp_path, monkeypatch):
  """`write_module(code)` makes a module that child processes find."""
  paths = os.pathsep.join(map(str, (tmp_path, ROOT)))
  monkeypatch.setenv("PYTHONPATH", paths)

  def write(code):
    (tmp_path / "measured.py").write_text(code)
    return "measured"

  return write


def test_only_what_is_missing_runs(tmp_path, write_module, capsys):
  module = write_module(SCRIPT)
  path = str(tmp_path / "rows.csv")
  measure = lambda *sizes: processes.measure_missing(
    module, path, [{"size": size} for size in sizes], ("ms", "version")
  )
  row = lambda size: {"size": size, "ms": 10 * size, "version": "jax 1.0"}
  assert measure(1, 3) == [row(1)]
  assert "no such size" in capsys.readouterr().err
  assert measure(1, 2) == processes.read(path) == [row(1), row(2)]
  assert "1,10,jax 1.0" in pathlib.Path(path).read_text().splitlines()
  assert (tmp_path / "ran.txt").read_text().split() == ["1", "2"]


IN_TURN = """
import json, pathlib, sys
from benchmarks.processes import median_times
case = json.loads(sys.argv[2])
log = pathlib.Path(__file__).with_name("log.txt").open("a", buffering=1)
print(case["form"] + case["size"], "starts", file=log)
call = lambda: print(case["form"] + case["size"], file=log)
ms, _ = median_times(call, case["repeats"], in_turn=True, settle_s=0.0)
if case["form"] == "c":
  sys.exit("not c")
print(json.dumps({"is_short": ms < 1.0}))
"""


def test_what_is_compared_takes_turns(tmp_path, write_module, capsys):
  module = write_module(IN_TURN)
  cases = [
    {"form": form, "size": size, "repeats": 2}
    for form, size in ["a1", "a2", "b1", "c1"]
  ]
  rows = processes.measure_missing(
    module,
    str(tmp_path / "rows.csv"),
    cases,
    ["is_short"],
    compared="form",
  )
  assert rows == [cases[i] | {"is_short": True} for i in (0, 2, 1)]
  assert "not c" in capsys.readouterr().err
  lines = (tmp_path / "log.txt").read_text().splitlines()
  assert lines[:3] == ["a1 starts", "b1 starts", "c1 starts"]
  assert lines[3:] == ["a1", "b1", "c1"] * 2 + ["a2 starts", "a2", "a2"]


SLOW_AT_FIRST = """
import json, sys, time
from benchmarks.processes import median_times
last = 0.0
def call():
  global last
  time.sleep(0.2 if time.perf_counter() - last > 0.1 else 0.01)
  last = time.perf_counter()
seconds, _ = median_times(call, 2, in_turn=True, settle_s=0.3)
print(json.dumps({"is_short": seconds < 0.1}))
"""


def test_the_first_run_of_a_turn_is_not_timed(tmp_path, write_module):
  module = write_module(SLOW_AT_FIRST)
  cases = [{"form": "a"}, {"form": "b"}]
  rows = processes.measure_missing(
    module,
    str(tmp_path / "rows.csv"),
    cases,
    ["is_short"],
    compared="form",
  )
  assert rows == [case | {"is_short": True} for case in cases]


def test_peak_is_above_what_is_held():
  before = peers.forget_peak()
  block = bytearray(64 * 2**20)
  block[:: 2**12] = b"x" * (len(block) // 2**12)
  del block
  assert 60 < peers.peak_mib() - before < 80


def test_a_checkout_that_is_none(tmp_path, monkeypatch, capsys):
  flags = ["peers.py", f"--spectraformer={tmp_path}"]
  monkeypatch.setattr(sys, "argv", flags)
  with pytest.raises(SystemExit):
    peers.main()
  assert "no models/model_LRA.py there" in capsys.readouterr().err


def test_use_cores_keeps_the_process_to_that_many():
  script = (
    "import os; from benchmarks.processes import use_cores; use_cores(1); "
    "print(len(os.sched_getaffinity(0)))"
  )
  command = [sys.executable, "-c", script]
  assert subprocess.check_output(command, cwd=ROOT, text=True) == "1\n"
  with pytest.raises(ValueError, match="threads=100000: there are"):
    processes.use_cores(100_000)
