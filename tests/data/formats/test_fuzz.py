"""Every reader under damaged files, fixed by their numbers."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.data import fuzz

ROOT = pathlib.Path(fuzz.__file__).parents[2]


def run(first, count, *names):
  """Reads so many damaged files of each format in a process of its own."""
  process = subprocess.run(
    [sys.executable, "-m", "tests.data.fuzz", str(first), str(count), *names],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=100 + count * len(names),
  )
  assert process.returncode == 0, process.stdout + process.stderr[-2000:]


def test_some_hundred_damages():
  run(0, 30, *fuzz.FORMATS)


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_ten_thousand_damages(name):
  run(0, 10_000, name)
