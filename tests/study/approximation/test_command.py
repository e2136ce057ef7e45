import csv

import numpy as np
import pytest

from spectraformer_jax.study.__main__ import main
from spectraformer_jax.study.approximation import measure as lib
from tests.study.approximation.helpers import row

SMALL = [
  "approximation",
  "--num_features",
  "8",
  "16",
  "--lengths",
  "16",
  "--draws",
  "3",
  "--batch",
  "1",
  "--heads",
  "1",
  "--head_dim",
  "4",
]


def read(folder):
  with (folder / "results.csv").open(newline="") as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """All files of a small run."""
  folder = tmp_path_factory.mktemp("study")
  pairs = ("posrf-iid", "elu1-none")
  scales = ("--scales", "0.25", "3")
  assert main([*SMALL, f"--out={folder}", "--pairs", *pairs, *scales]) == 0
  return folder


@pytest.mark.slow
def test_all_rows_are_there(folder):
  rows = read(folder)
  assert len(rows) == (2 + 1) * 2
  assert {row["num_features"] for row in rows} == {"8", "16", ""}
  for one in rows:
    assert 0 < float(one["error"]) < float("inf")
    assert float(one["ms"]) > 0 and float(one["exact_ms"]) > 0
  uniform = {row["scale"]: row["uniform_error"] for row in rows}
  assert float(uniform["0.25"]) < float(uniform["3.0"])


def test_maps_without_rows_do_not_vary(folder):
  fixed = [row for row in read(folder) if row["component"] == "elu1"]
  assert {row["output_variance"] for row in fixed} == {"0"}
  # The features of elu1 are its kernel, to rounding.
  assert max(float(row["kernel_mse"]) for row in fixed) < 1e-9


def test_report_shows_settings_advice_and_pictures(folder):
  text = (folder / "report.md").read_text()
  for needed in (
    "python -m spectraformer_jax.study approximation --num_features 8 16",
    "## random, length 16, scale 0.25",
    "## random, length 16, scale 3",
    "| uniform attention |",
    "| posrf-iid |",
    "](error_vs_features.png)",
  ):
    assert needed in text, needed
  for name in ("error_vs_features", "error_vs_scale", "heat_map"):
    picture = (folder / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
  assert not list(folder.glob(".*"))


@pytest.fixture
def counted(monkeypatch):
  """Measurements that cost nothing; the rows that were asked for."""
  asked = []

  def measure(program, inputs, scale, reference, options):
    asked.append((program, inputs.length, scale))
    return row().figures

  prepare = lambda fm, *_: (fm.info.name, fm.num_features)
  make_reference = lambda *_: lib.Reference(np.ones(1), 0.8, 1.0, 1.0)
  monkeypatch.setattr(lib, "measure", measure)
  monkeypatch.setattr(lib, "prepare", prepare)
  monkeypatch.setattr(lib, "make_reference", make_reference)
  return asked


def test_rows_of_the_file_are_not_measured_again(counted, tmp_path):
  command = [*SMALL, f"--out={tmp_path}", "--pairs", "posrf-iid"]
  assert main([*command, "--scales", "1"]) == 0
  assert counted == [(("posrf-iid", m), 16, 1.0) for m in (8, 16)]
  counted.clear()
  assert main([*command, "--scales", "1", "2"]) == 0
  assert counted == [(("posrf-iid", m), 16, 2.0) for m in (8, 16)]
  # A kill in the middle of a line loses that line.
  path = tmp_path / "results.csv"
  path.write_text(path.read_text()[:-20])
  counted.clear()
  assert main([*command, "--scales", "1", "2"]) == 0
  assert counted == [(("posrf-iid", 16), 16, 2.0)]
  # Other inputs are not those of the file.
  counted.clear()
  assert main([*command, "--scales", "1", "--seed", "1"]) == 0
  assert len(counted) == 2


def test_other_numbers_under_the_same_name_are_measured(counted, tmp_path):
  command = ["approximation", f"--out={tmp_path}", "--pairs", "posrf-iid"]
  command += ["--num_features", "8", f"--inputs={tmp_path}/mine.npz"]
  for factor in (1.0, 2.0, 2.0):
    x = factor * np.ones((1, 4, 1, 2))
    np.savez(tmp_path / "mine.npz", q=x, k=x, v=x)
    assert main(command) == 0
  assert len(counted) == 2


def test_sizes_that_do_not_fit_are_told_and_left_out(counted, tmp_path, capsys):
  command = [*SMALL, f"--out={tmp_path}", "--scales", "1"]
  assert main([*command, "--pairs", "posrf-iid", "posrf-sgq"]) == 0
  assert {program[0] for program, *_ in counted} == {"posrf-iid"}
  out = " ".join(capsys.readouterr().out.split())
  assert "left out: posrf-sgq, M = 8:" in out
  assert "- posrf-sgq, M = 16:" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--pairs", "posrff-orf"], "Did you mean 'posrf'"),
    (["--pairs", "orf"], "write component-matrix"),
    (["--components", "posrf"], "--components and --matrices go together"),
    (["--inputs", "no/such.npz"], "there is no 'no/such.npz'"),
    (["--scales", "0"], "--scales must be positive"),
    (["--num_features", "0"], "--num_features must be a positive integer"),
    (["--split", "dev"], "--split is for a workdir only"),
    (["--draws", "0"], "--draws must be a positive integer"),
    (["--causal", "--pairs", "oprf-orf"], "nothing is left to measure"),
    (["--window", "wide"], "--window must be None, an int of 0 or more"),
    (["--causal", "--num_heavy", "2"], "--num_heavy cannot be combined with"),
    (["--pairs", "elu1-none", "--window", "3"], "nothing is left to measure"),
  ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path, capsys):
  assert main(["approximation", f"--out={tmp_path}/out", *arguments]) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_the_error_falls_where_keys_are_exact(tmp_path):
  command = [*SMALL, f"--out={tmp_path}", "--scales", "1"]
  command += ["--pairs", "posrf-iid", "--num_features", "8"]
  for exact in ([], ["--window=2,5"], ["--num_heavy=16"]):
    assert main([*command, *exact]) == 0
  rows = read(tmp_path)
  assert [row["window"] for row in rows] == ["", "(2, 5)", ""]
  none, near, every = (float(row["error"]) for row in rows)
  assert near < none and every < 1e-5
  report = (tmp_path / "report.md").read_text()
  assert "## random, length 16, scale 1, num_heavy 16" in report


def test_options_of_other_inputs_are_refused(tmp_path, capsys):
  x = np.ones((1, 4, 1, 2))
  np.savez(tmp_path / "f.npz", q=x, k=x, v=x)
  command = ["approximation", f"--out={tmp_path}", f"--inputs={tmp_path}/f.npz"]
  assert main([*command, "--heads", "2"]) == 2
  assert "--heads is for random inputs only" in capsys.readouterr().err
  assert main([*command, "--lengths", "9"]) == 2
  assert "have 4 positions" in capsys.readouterr().err
