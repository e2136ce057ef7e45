"""The examples of CONTRIBUTING.md run, and the paths it names exist."""

import re

import pytest

from tests.helpers import ROOT, python_blocks, run_python

BLOCKS = python_blocks("CONTRIBUTING.md")


def test_there_is_an_example_of_each_kind():
  assert len(BLOCKS) == 2
  assert "check_component(" in BLOCKS[0]
  assert "check_weight_matrix(" in BLOCKS[1]


# In an interpreter of its own: a registered name would show up in other tests.
@pytest.mark.parametrize("index", range(len(BLOCKS)))
@pytest.mark.quick_every(2)
def test_example_runs(index, tmp_path):
  doctests = "\nimport doctest\nassert doctest.testmod().attempted\n"
  process = run_python(BLOCKS[index] + doctests, tmp_path)
  assert process.returncode == 0, process.stderr
  assert process.stdout == ""  # A doctest that fails prints.


def test_named_files_exist():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  names = re.findall(
    r"\b(?:docs|tests|spectraformer_jax|benchmarks)/[\w/.]*", text
  )
  assert names
  assert [n for n in names if not (ROOT / n.rstrip(".")).exists()] == []
