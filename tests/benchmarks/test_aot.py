"""What accelerators' compilers say of our programs does not get worse.

Needs the extra `tpu` or `cuda`; each case takes a minute or two.
"""

import importlib.util

import pytest

from benchmarks import aot

ROWS = aot.read_rows(aot.CSV)
MARGIN = 1.05
COMPILERS = {"h100": "jax_cuda13_plugin"}


def worse(new: aot.Row, old: aot.Row) -> list[str]:
  """Figures that are more than 5 % above those of the file."""
  return [
    f"{name}: {getattr(new, name)}, in the file {getattr(old, name)}"
    for name in ("peak", "ms", "traffic", "all_reduces", "others")
    if getattr(old, name) is not None
    and getattr(new, name) > MARGIN * getattr(old, name)
  ]


def test_every_case_has_a_row_without_error():
  assert list(ROWS) == [case.name for case in aot.cases()]
  assert not [row.case for row in ROWS.values() if row.error]


def test_more_than_a_margin_is_worse():
  old = aot.Row("a", peak=100.0, ms=2.0, traffic=10.0, all_reduces=1, others=0)
  assert not worse(old._replace(peak=104.9, ms=1.0), old)
  assert len(worse(old._replace(peak=106.0, all_reduces=2, others=1), old)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("case", aot.cases(), ids=lambda case: case.name)
def test_no_worse_than_the_file(case):
  compiler = COMPILERS.get(case.target, "libtpu")
  if importlib.util.find_spec(compiler) is None:
    pytest.skip(f"needs {compiler}")
  old = ROWS[case.name]
  new = aot.compile_elsewhere(case)
  assert not new.error
  assert not worse(new, old), f"{new.versions}; the file: {old.versions}"
