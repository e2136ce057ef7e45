"""Compiled programs are not worse than the figures that are kept of them."""

import importlib.util

import pytest

from benchmarks import aot

ROWS = aot.read_rows(aot.CSV)
COMPILERS = {"h100": "jax_cuda13_plugin"}  # of others: libtpu
WORSE = 1.05


def test_every_case_has_a_row():
  assert {case.name for case in aot.cases()} == set(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
  "case", [c for c in aot.cases() if c.name in ROWS], ids=lambda c: c.name
)
def test_no_figure_gets_worse(case):
  compiler = COMPILERS.get(case.target, "libtpu")
  if importlib.util.find_spec(compiler) is None:
    pytest.skip(f"needs {compiler}")
  kept, row = ROWS[case.name], aot.compile_elsewhere(case)
  if kept.versions and row.versions and kept.versions != row.versions:
    pytest.skip(f"made with {kept.versions}, here is {row.versions}")
  assert row.error == kept.error
  for name in ("peak", "temporary", "cycles", "traffic"):
    before, now = getattr(kept, name), getattr(row, name)
    if before is not None:
      assert now <= WORSE * before, f"{name}: {now}, was {before}"
  assert (row.all_reduces, row.others) == (kept.all_reduces, kept.others)
