"""Documentation that runs: docstrings, README, generated tables, imports."""

import doctest
import importlib
import importlib.util
import pkgutil
import re

import pytest

import spectraformer_jax as sf
from tests.helpers import ROOT, python_blocks, run_python

PACKAGE = ROOT / "spectraformer_jax"
MODULES = sorted(
  module.name
  for module in pkgutil.walk_packages(sf.__path__, "spectraformer_jax.")
)
MAX_LINES = 450


def test_modules_are_all_found():
  files = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
  }
  assert files <= set(MODULES)


@pytest.mark.parametrize("name", ["spectraformer_jax", *MODULES])
@pytest.mark.quick_every(6)
@pytest.mark.filterwarnings("ignore:.* is now spectraformer_jax")
def test_doctests(name):
  module = importlib.import_module(name)
  result = doctest.testmod(module, optionflags=doctest.FAIL_FAST)
  assert result.failed == 0, f"python -m doctest shows why {name} fails."


def test_public_names_have_docstrings():
  assert [
    name
    for name in sf.__all__
    if not isinstance(getattr(sf, name), str)
    and not (getattr(sf, name).__doc__ or "").strip()
  ] == []


@pytest.mark.parametrize(
  "name",
  [
    "README.md",
    "docs/attention.md",
    "docs/clients.md",
    "docs/hybrid.md",
    pytest.param("docs/linearize.md", marks=pytest.mark.slow),
  ],
)
def test_code_of_the_documentation_runs(name, tmp_path):
  blocks = python_blocks(name)
  assert blocks
  process = run_python("\n".join(blocks), tmp_path)
  assert process.returncode == 0, process.stderr


def test_import_is_light(tmp_path):
  heavy = ("flax", "tensorflow", "optax", "matplotlib", "orbax")
  process = run_python(
    "import sys, spectraformer_jax as sf\n"
    "[getattr(sf, name) for name in sf.__all__ if name != 'nn']\n"
    f"print([name for name in {heavy} if name in sys.modules])",
    tmp_path,
  )
  assert process.stdout.strip() == "[]", process.stdout + process.stderr


def test_files_are_short():
  lines = {
    str(path.relative_to(ROOT)): len(path.read_text().splitlines())
    for path in PACKAGE.rglob("*.py")
  }
  assert {name: n for name, n in lines.items() if n >= MAX_LINES} == {}


@pytest.fixture(scope="module")
def make_tables():
  """The script that generates docs, as a module."""
  spec = importlib.util.spec_from_file_location(
    "make_tables", ROOT / "docs" / "make_tables.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("page", ["components", "weight_matrices"])
def test_generated_table_is_up_to_date(make_tables, page):
  committed = (ROOT / "docs" / f"{page}.md").read_text()
  generated = getattr(make_tables, f"{page}_page")()
  hint = f"docs/{page}.md is stale: run `{make_tables.COMMAND}`."
  assert committed == generated, hint


def test_picture_of_pairs_is_up_to_date(make_tables):
  stored = make_tables.picture_fingerprint(ROOT / "docs" / "pairs.png")
  current = make_tables.fingerprint(make_tables.pair_statuses())
  assert stored == current, (
    f"docs/pairs.png is stale: run `{make_tables.COMMAND}`."
  )


def test_pages_name_every_entry(make_tables):
  for page, names in (
    ("components", sf.list_components()),
    ("weight_matrices", sf.list_weight_matrices()),
  ):
    text = getattr(make_tables, f"{page}_page")()
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == set(names)


def test_picture_knows_exactly_the_valid_pairs(make_tables):
  works = {
    (component, matrix)
    for component, row in make_tables.pair_statuses().items()
    for matrix, letter in row.items()
    if not make_tables.STATUSES[letter][1].startswith("refused")
  }
  assert works == set(sf.list_feature_maps())
