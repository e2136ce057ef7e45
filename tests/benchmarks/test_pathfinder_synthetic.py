import pytest

from benchmarks import pathfinder_synthetic


@pytest.mark.slow
def test_prints_a_row_for_each_kind_and_what_leaks(capsys):
  lines = pathfinder_synthetic.main(["--seconds=0.05", "--flood=5"])
  assert capsys.readouterr().out.splitlines() == "\n".join(lines).splitlines()
  header, *rows, leak = lines
  columns = header.splitlines()[0].count("|")
  assert len(rows) == 8 and all(line.count("|") == columns for line in rows)
  assert all(": 0, 0 |" in line for line in rows)
  assert "commonest label 0." in leak
