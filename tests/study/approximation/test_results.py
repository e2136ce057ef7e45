import pytest

from spectraformer_jax.study.approximation import advice, report
from spectraformer_jax.study.approximation.results import Results
from spectraformer_jax.study.approximation.settings import settings_of
from tests.helpers import ROOT
from tests.study.approximation.helpers import row


def test_rows_come_back(tmp_path):
  path = tmp_path / "results.csv"
  rows = [
    row(),
    row("relu-none", None),
    row(scale=1 / 3, kernel_mse=float("inf")),
    row(window=(63, 0), num_sinks=4),
  ]
  results = Results(path)
  for one in rows:
    results.add(one)
  again = Results(path)
  for one in rows:
    assert again.rows[one.key] == one
  assert row(seed=1).key not in again.rows


def test_a_file_without_exact_keys_gets_their_columns(tmp_path):
  path = tmp_path / "results.csv"
  Results(path).add(row())
  names, cells = path.read_text().splitlines()
  earlier = [
    line.replace(part, ",") + "\n"
    for line, part in (
      (names, ",window,num_sinks,num_heavy,"),
      (cells, ",,0,0,"),
    )
  ]
  path.write_text("".join(earlier))
  assert Results(path).rows == {row().key: row()}
  assert path.read_text() == f"{names}\n{cells}\n"


def test_rows_with_exact_keys_are_a_setting_of_their_own():
  both = settings_of([row(), row(window=(3, 3), num_heavy=2)])
  assert [setting.title for setting in both] == [
    "random, length 256, scale 1",
    "random, length 256, scale 1, window (3, 3), num_heavy 2",
  ]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
  path = tmp_path / "results.csv"
  results = Results(path)
  results.add(row())
  results.add(row(scale=2.0))
  path.write_text(path.read_text()[:-30])
  results = Results(path)
  assert row().key in results.rows
  assert row(scale=2.0).key not in results.rows
  results.add(row(scale=2.0))
  assert row(scale=2.0).key in Results(path).rows


def test_another_table_is_refused(tmp_path):
  path = tmp_path / "results.csv"
  path.write_text("a,b\n1,2\n")
  with pytest.raises(ValueError, match="is not a table of this command"):
    Results(path)


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
  path = tmp_path / "results.csv"
  committed = ROOT / "docs/study"
  path.write_bytes((committed / "results.csv").read_bytes())
  settings = settings_of(list(Results(path).rows.values()))
  assert path.read_bytes() == (committed / "results.csv").read_bytes()
  text = (committed / "report.md").read_text()
  assert len(settings) == 4
  for setting in settings:
    table = "\n".join(report.markdown(report.table_rows(setting)))
    section = f"## {setting.title}\n\n{advice.advise(setting)}\n\n{table}\n"
    assert section in text
