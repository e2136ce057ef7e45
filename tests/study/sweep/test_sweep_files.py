"""The sweeps that are shipped: every cell of theirs can be built."""

import jax
import pytest

from spectraformer_jax.nn.from_config import make_feature_map
from spectraformer_jax.study.sweep import runs as cell_runs
from spectraformer_jax.study.sweep.cells import expand, load_sweep
from tests.helpers import ROOT

pytestmark = pytest.mark.filterwarnings(
  "ignore:.* has the variance:UserWarning"
)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


def cells_of(name):
  return expand(load_sweep(ROOT / "configs" / "sweeps" / f"{name}.py"))


def test_every_sweep_file_is_looked_at_here():
  found = {path.stem for path in (ROOT / "configs" / "sweeps").glob("*.py")}
  assert found == {"paper", "small"}


@pytest.mark.parametrize("name", ["paper", "small"])
@pytest.mark.quick_every(2)
def test_every_first_cell_builds_its_config_and_feature_map(name):
  cells = [cell for cell in cells_of(name) if cell.seed == 0]
  for cell in cells:
    config = cell.config()
    is_pair = "-" in cell.attention
    feature_map = make_feature_map(config)
    assert (feature_map is not None) == is_pair, cell.name
    if is_pair:
      # Whether so many rows are possible is known with the head_dim only.
      sizes = {"head_dim": config.model.head_dim, "num_heads": 2}
      jax.eval_shape(
        lambda fm=feature_map, sizes=sizes: fm.init(jax.random.key(0), **sizes)
      )


@pytest.mark.slow
def test_the_paper_s_table_is_all_there():
  cells = cells_of("paper")
  assert len(cells) == 24 * 5 * 3
  mine = {(cell.attention, cell.task) for cell in cells}
  theirs = set(cell_runs.paper_figures())
  left_out = {attention for attention, _ in theirs - mine}
  assert left_out == {"bigbird", "reformer", "informer"}
  assert {a for a, _ in mine - theirs} == {"gaussian", "local"}
  for cell in cells[:120]:
    config = cell.config()
    assert config.train.num_steps == 50_000
    features = 65 if cell.attention.endswith("sgq") else 128
    assert config.feature_map.num_features == features


def test_the_small_sweep_is_as_large_as_it_says():
  cells = cells_of("small")
  assert len({cell.attention for cell in cells}) == 9
  assert len(cells) == 9 * 3 * 3
  assert "softmax" in {cell.attention for cell in cells}
