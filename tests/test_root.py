"""The root package: names that are imported when they are first used."""

import pathlib
import subprocess
import sys

import pytest

import spectraformer_jax as sf

ROOT = pathlib.Path(sf.__file__).parents[1]


def run_python(code):
  """The standard output of a fresh process that runs `code`."""
  process = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=100,
  )
  assert process.returncode == 0, process.stderr
  return process.stdout.strip()


def test_every_public_name_has_a_home():
  assert {*sf._HOMES, *sf._SUBMODULES, "__version__"} == set(sf.__all__)
  assert set(sf.__all__) <= set(dir(sf))


KINDS = """
import types
import spectraformer_jax as sf
is_module = lambda name: isinstance(getattr(sf, name), types.ModuleType)
modules = list(filter(is_module, sf.__all__))
names = ["components", "kernels", "linearize", "nn", "weight_matrices"]
assert modules == names, modules
import pickle
from spectraformer_jax import *
assert pickle.loads(pickle.dumps(linear_attention)) is sf.linear_attention
assert callable(sf.linear_attention)
"""


@pytest.mark.parametrize(
  "first",
  [
    "import spectraformer_jax.linear_attention.xla",
    "from spectraformer_jax import linear_attention",
    "import spectraformer_jax.attention, spectraformer_jax.kernels",
    "import spectraformer_jax.nn, spectraformer_jax.testing",
    "import spectraformer_jax.data, spectraformer_jax.train.config",
  ],
)
def test_names_mean_the_same_whatever_was_imported_before(first):
  # A submodule that is imported sets an attribute of the root.
  run_python("\n".join([first, KINDS, first, KINDS]))


def test_an_unknown_name_is_refused():
  with pytest.raises(AttributeError, match="no attribute 'linear_attentoin'"):
    sf.linear_attentoin  # noqa: B018
