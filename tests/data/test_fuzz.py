"""Every reader under damaged files, fixed by their numbers."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.data import fuzz

ROOT = pathlib.Path(fuzz.__file__).parents[2]


def run(name, first, count):
  """Reads so many damaged files in a process of its own."""
  process = subprocess.run(
    [sys.executable, "-m", "tests.data.fuzz", name, str(first), str(count)],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60 + count,
  )
  assert process.returncode == 0, process.stdout + process.stderr[-2000:]


@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_a_few_damages(name):
  run(name, 0, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_ten_thousand_damages(name):
  run(name, 0, 10_000)
