import csv

import numpy as np
import pytest

from benchmarks import weight_matrix_mse as script
from spectraformer_jax.weight_matrices import WEIGHT_MATRICES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("mse") / "table.csv"
  lines = script.main(
    ["--draws=300", "--matrices", "iid", "orf", "mm", f"--csv={path}"]
  )
  with open(path, newline="") as file:
    assert list(csv.reader(file)) == lines
  header, *rows = lines
  return {
    (row[0], int(row[1])): dict(zip(header, row, strict=True)) for row in rows
  }


@pytest.mark.slow
def test_iid_rows_have_the_closed_form_variance(run):
  # 300 draws, averages of 64 pairs: standard errors 3 to 7 %.
  for num_rows in (32, 128):
    row = run["iid", num_rows]
    for name in ("trig.2", "trig.1", "pos.1"):
      assert float(row[name]) == pytest.approx(1.0, abs=0.2), (num_rows, name)


@pytest.mark.slow
def test_orthogonal_rows_gain(run):
  assert float(run["orf", 128]["trig.1"]) < 0.12
  assert float(run["orf", 32]["trig.2"]) == pytest.approx(0.378, rel=0.15)


@pytest.mark.slow
def test_matrices_that_need_more_rows_than_columns_are_skipped(run):
  assert set(run) == {
    ("iid", 32),
    ("iid", 128),
    ("orf", 32),
    ("orf", 128),
    ("mm", 128),
  }


def test_every_matrix_has_a_row_and_every_reference_is_used():
  rows = script.read_rows()
  assert {row.matrix for row in rows} == {
    name for name in WEIGHT_MATRICES.names() if name != "none"
  }
  references = {name for name, _ in script.read_reference()}
  assert {row.reference for row in rows} - {""} == references
  assert all(row.note for row in rows if row.excepted)


def test_a_figure_outside_the_tolerance_is_flagged_unless_it_is_excepted():
  row = script.ListedMatrix("orf", {}, "orf", "a note")
  reference = script.read_reference()["orf", 128]
  result = script.Result(row, 128, reference.copy(), 0 * reference, reference)
  assert script.verdict(result) == "ok"
  result.ratios[1:3] *= 1.2  # pos.2 may be off by 30 %
  assert script.verdict(result) == "off: trig.1"
  excepted = result._replace(row=row._replace(excepted=("trig.1",)))
  assert script.verdict(excepted) == "excepted: trig.1"
  unknown = result._replace(reference=np.full(4, np.nan))
  assert script.verdict(unknown) == "no reference"
  lines = [["verdict"], *([script.verdict(r)] for r in (result, excepted))]
  assert script.summary(lines).endswith("0 without reference, 1 off.")


@pytest.mark.slow
def test_draw_times():
  header, *lines = script.main(["--draw_time", "--matrices", "iid", "orf"])
  assert header[:2] == ["matrix", "ms"]
  assert [line[0] for line in lines] == ["iid", "orf"]
  assert all(float(line[1]) > 0 for line in lines)


@pytest.mark.parametrize(
  ("verdict", "status"),
  [("ok", 0), ("excepted: pos.1", 0), ("off: trig.1", 1), ("too slow", 1)],
)
def test_exit_status(verdict, status):
  lines = [["matrix", "verdict"], ["iid", "ok"], ["orf", verdict]]
  assert script.exit_status(lines) == status


def test_an_unknown_matrix_is_named():
  with pytest.raises(ValueError, match="Did you mean 'orf'"):
    script.main(["--matrices", "orff"])
