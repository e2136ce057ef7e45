"""Tables: figures, marks, provenance, the authors' figures beside ours."""

import csv
import json
import re

import numpy as np
import pytest
from scipy import stats

from spectraformer_jax.study import __main__ as study
from spectraformer_jax.study.sweep import runs as cell_runs
from tests.study.sweep.helpers import write_run, write_sweep


def write_table(folder, *flags):
  """Runs the command; returns its Markdown, rows of its CSV, and its folder."""
  out = folder / "tables"
  status = study.main(["table", str(folder / "s"), f"--out={out}", *flags])
  assert status == 0
  with (out / "table.csv").open() as file:
    return (out / "table.md").read_text(), list(csv.DictReader(file)), out


def row(markdown, label):
  """The cells of the first row of a label by heading."""
  lines = markdown.splitlines()
  split = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
  headings = next(line for line in lines if line.startswith("| attention"))
  found = next(line for line in lines if line.startswith(f"| {label} |"))
  return dict(zip(split(headings), split(found), strict=True))


def test_means_deviations_and_costs(tmp_path):
  write_sweep(tmp_path / "s", ["softmax", "oprf-orf", "local"])
  markdown, rows, _ = write_table(tmp_path)
  cells = row(markdown, "oprf-orf")
  assert cells["listops %"] == "42.20 (0.20) +"
  assert cells["digits %"] == "72.20 (0.20) +"
  assert cells["mean %"] == "57.20"
  assert (cells["listops min"], cells["mean min"]) == ("2.00", "3.00")
  assert (cells["listops GB"], cells["parameters"]) == ("1.10", "12,345")
  found = {(r["task"], r["attention"]): r for r in rows}
  assert len(rows) == 6 + 3
  mean = found["mean over tasks", "oprf-orf"]
  assert float(mean["accuracy"]) == pytest.approx(57.2)
  assert float(mean["seconds"]) == pytest.approx(180.0)
  assert (mean["accuracy_sd"], mean["paper_accuracy"]) == ("", "")
  exact = found["listops", "oprf-orf"]
  assert float(exact["accuracy"]) == pytest.approx(42.2)
  assert float(exact["accuracy_sd"]) == pytest.approx(0.2)
  assert exact["provenance"] == "generated"


def test_the_authors_figures_are_marked_and_only_where_they_exist(tmp_path):
  write_sweep(tmp_path / "s", ["softmax", "oprf-orf", "local"])
  markdown, rows, out = write_table(tmp_path)
  assert row(markdown, "oprf-orf")["listops %†"] == "38.05 (0.78)"
  assert row(markdown, "local")["listops %†"] == "-"
  assert "digits %†" not in row(markdown, "local")
  assert "† The authors' own figures" in markdown
  assert "not measured here" in markdown
  latex = (out / "table.tex").read_text()
  assert re.search("% † The authors' own figures .*not measured here", latex)


def test_the_authors_means_stand_beside_ours_for_all_five_tasks(tmp_path):
  tasks = ("listops", "text", "retrieval", "image", "pathfinder")
  for task in tasks:
    hours = {"train_seconds": 7200.0}
    write_run(tmp_path / "s", task, "softmax", 0, 0.5, **hours)
    write_run(tmp_path / "s", task, "local", 0, 0.5, **hours)
  markdown, *_ = write_table(tmp_path)
  cells = row(markdown, "softmax")
  assert list(cells)[2::2][:5] == [f"{task} %" for task in tasks]
  assert (cells["mean %"], cells["mean %†"]) == ("50.00", "56.82")
  assert (cells["mean h"], cells["mean h†"]) == ("2.00", "4.56")
  assert cells["mean GB†"] == "8.79"
  assert row(markdown, "local")["mean %†"] == "-"


def test_figures_of_the_paper_are_complete():
  figures = cell_runs.paper_figures()
  attentions = {attention for attention, _ in figures}
  assert len(attentions) == 25 and len(figures) == 25 * 5
  pairs = {name for name in attentions if "-" in name}
  assert len(pairs) == 18
  # The means of the authors' own row for OPRF-OR.
  mean = lambda name: np.mean(
    [getattr(f, name) for (a, _), f in figures.items() if a == "oprf-orf"]
  )
  assert mean("accuracy") == pytest.approx(56.07, abs=0.006)
  assert mean("hours") == pytest.approx(1.39, abs=0.006)
  assert mean("gigabytes") == pytest.approx(2.87, abs=0.06)


def test_significance_is_welch_with_holm(tmp_path):
  values = {
    "softmax": (0.50, 0.52, 0.54),
    "a-b": (0.501, 0.525, 0.541),
    "c-d": (0.70, 0.71, 0.72),
    "e-f": (0.40, 0.41, 0.42),
  }
  for attention, accuracies in values.items():
    for seed, accuracy in enumerate(accuracies):
      write_run(tmp_path / "s", "digits", attention, seed, accuracy)
  markdown, rows, _ = write_table(tmp_path)
  found = {r["attention"]: r for r in rows}
  assert found["a-b"]["verdict"] == "not significant"
  assert found["c-d"]["verdict"] == "better"
  assert found["e-f"]["verdict"] == "worse"
  raw = stats.ttest_ind(values["c-d"], values["softmax"], equal_var=False)
  assert float(found["c-d"]["p"]) == pytest.approx(3 * raw.pvalue)
  assert row(markdown, "a-b")["digits %"].endswith(")")
  assert row(markdown, "c-d")["digits %"].endswith("+")
  assert row(markdown, "e-f")["digits %"].endswith("−")
  assert re.search(r"\| digits \| a-b \| \+0.23 ± .* \| not sig", markdown)


def test_one_seed_and_equal_values_are_no_evidence(tmp_path):
  write_run(tmp_path / "s", "digits", "softmax", 0, 0.5)
  write_run(tmp_path / "s", "digits", "softmax", 1, 0.5)
  write_run(tmp_path / "s", "digits", "one-seed", 0, 0.9)
  write_run(tmp_path / "s", "digits", "no-spread", 0, 0.9)
  write_run(tmp_path / "s", "digits", "no-spread", 1, 0.9)
  markdown, rows, _ = write_table(tmp_path)
  assert {r["verdict"] for r in rows} == {"", "-"}
  assert cell_runs.welch([10.1, 10.3], [10.3, 10.1 - 1e-14])[0] == 0.0
  assert row(markdown, "one-seed")["digits %"] == "90.00 (-)"
  assert markdown.count("too few seeds to tell |") == 2


def test_missing_and_unfinished_cells_are_told(tmp_path):
  write_sweep(tmp_path / "s", ["softmax", "oprf-orf"])
  write_run(tmp_path / "s", "digits", "local", 0, 0.99)
  waiting = tmp_path / "s/digits/local/seed1"
  waiting.mkdir()
  (waiting / "cell.json").write_text("{}")
  markdown, *_ = write_table(tmp_path)
  assert row(markdown, "local")["listops %"] == "-"
  assert row(markdown, "local")["mean %"] == "-"
  assert "Not finished: digits/local/seed1." in markdown
  # An attention without all tasks is not ranked above those with them.
  order = [row(markdown, "oprf-orf"), row(markdown, "local")]
  assert markdown.index("| oprf-orf |") < markdown.index("| local |"), order


def test_shards_of_two_machines_are_one_sweep(tmp_path, capsys):
  write_run(tmp_path / "s", "digits", "softmax", 0, 0.5)
  write_run(tmp_path / "t", "digits", "softmax", 1, 0.7)
  out = f"--out={tmp_path / 'tables'}"
  assert study.main(["table", f"{tmp_path}/s", f"{tmp_path}/t", out]) == 0
  assert "60.00 (14.14)" in capsys.readouterr().out
  write_run(tmp_path / "t", "digits", "softmax", 0, 0.7)
  assert study.main(["table", f"{tmp_path}/s", f"{tmp_path}/t", out]) == 2
  assert "are the same cell" in capsys.readouterr().err


def test_latex_has_as_many_cells_in_each_row(tmp_path):
  write_sweep(tmp_path / "s", ["softmax", "oprf-fastfood_learnable"])
  *_, out = write_table(tmp_path)
  lines = (out / "table.tex").read_text().splitlines()
  body = [line for line in lines if line.endswith(r"\\")]
  assert len(body) == 3 and len({line.count("&") for line in body}) == 1
  columns = re.search(r"\{l(r+)\}", "\n".join(lines))[1]
  assert len(columns) == body[0].count("&")
  assert r"oprf-fastfood\_learnable" in body[1] + body[2]
  assert not re.search(r"(?<!\\)[%_]", "\n".join(body))


def test_provenance_and_costs_of_a_device(tmp_path):
  write_run(
    tmp_path / "s", "digits", "local", 0, 0.5, peak_device_bytes=2 * 10**9
  )
  markdown, *_ = write_table(tmp_path, "--command=python -m x")
  assert row(markdown, "local")["digits GB"] == "2.00"
  assert "peak of the device" in markdown
  assert "git_revision: abc" in markdown and "devices: 1 x cpu" in markdown
  assert (
    "| digits | digits: generated | 400 / 400 / 400 | 100 x 8 |" in markdown
  )
  assert "python -m x" in markdown
  latex = (tmp_path / "tables/table.tex").read_text()
  assert "% git_revision: abc\n" in latex and "% devices: 1 x cpu\n" in latex


def test_errors(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  assert study.main(["table", f"{tmp_path}/empty", "--out=x"]) == 2
  assert "no finished cell" in capsys.readouterr().err
  write_sweep(tmp_path / "s", ["softmax"])
  assert study.main(["table", f"{tmp_path}/s", "--out=x", "--against=y"]) == 2
  assert "'y' is not among softmax" in capsys.readouterr().err


def test_cells_are_listed_one_by_one(tmp_path):
  write_sweep(tmp_path / "s", ["softmax", "local"])
  *_, out = write_table(tmp_path)
  with (out / "cells.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 12
  stored = tmp_path / "s/digits/local/seed2/metrics.jsonl"
  result = json.loads(stored.read_text().splitlines()[-1])
  assert float(rows[2]["test/accuracy"]) == result["test/accuracy"]
