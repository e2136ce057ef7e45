"""Measured rows are kept; only what is missing runs, and failures are named."""

import textwrap

from benchmarks import peers, processes

SCRIPT = """
import json, pathlib, sys
case = json.loads(sys.argv[2])
if case["size"] == 3:
  sys.exit("no such size")
with pathlib.Path(__file__).with_name("ran.txt").open("a") as file:
  file.write(f"{case['size']}\\n")
print("chatter")
print(json.dumps({"ms": 10 * case["size"]}))
"""


def test_only_what_is_missing_runs(tmp_path, capsys):
  script = tmp_path / "script.py"
  script.write_text(textwrap.dedent(SCRIPT))
  path = str(tmp_path / "rows.csv")
  cases = [{"size": 1}, {"size": 3}]
  rows = processes.measure_missing(str(script), path, cases, ("ms",))
  assert rows == [{"size": 1, "ms": 10}]
  assert "no such size" in capsys.readouterr().err
  cases = [{"size": 1}, {"size": 2}]
  rows = processes.measure_missing(str(script), path, cases, ("ms",))
  assert rows == [{"size": 1, "ms": 10}, {"size": 2, "ms": 20}]
  assert processes.read(path) == rows
  assert (tmp_path / "ran.txt").read_text().split() == ["1", "2"]


def test_peak_is_above_what_is_held():
  before = peers.forget_peak()
  block = bytearray(64 * 2**20)
  block[:: 2**12] = b"x" * (len(block) // 2**12)
  del block
  assert 60 < peers.peak_mib() - before < 80
