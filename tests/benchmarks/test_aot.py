"""Compiled programs are not worse than the figures that are kept of them."""

import pytest

from benchmarks import aot

ROWS = aot.read_rows(aot.CSV)
COMPILERS = {"h100": "jax_cuda13_plugin"}  # of others: libtpu
WORSE = 1.05


def test_every_case_has_a_row():
  assert {case.name for case in aot.cases()} == set(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("case", aot.cases(), ids=lambda case: case.name)
def test_no_figure_gets_worse(case):
  pytest.importorskip(COMPILERS.get(case.target, "libtpu"))
  kept, row = ROWS[case.name], aot.compile_elsewhere(case)
  assert row.error == kept.error
  for name in ("peak", "temporary", "cycles", "traffic"):
    before, now = getattr(kept, name), getattr(row, name)
    if before is not None:
      assert now <= WORSE * before, f"{name}, made with {kept.versions}"
  assert (row.all_reduces, row.others) == (kept.all_reduces, kept.others)
