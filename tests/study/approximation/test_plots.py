import pytest
from matplotlib.figure import Figure

from spectraformer_jax.study.approximation import plots
from spectraformer_jax.study.approximation.settings import settings_of
from tests.study.approximation.helpers import row

ALL = ["error_vs_features.png", "error_vs_scale.png", "heat_map.png"]


def names(folder, rows):
  return [path.name for path in plots.draw(settings_of(rows), folder)]


def test_only_what_there_is_to_draw(tmp_path):
  assert names(tmp_path, [row()]) == []
  assert names(tmp_path, [row(), row(num_features=128)]) == ALL[:1]
  assert names(tmp_path, [row(), row(scale=2.0)]) == ALL[1:2]
  assert names(tmp_path, [row(), row("relu-none", None)]) == ALL[2:]


def test_one_set_for_each_layer_and_length(tmp_path):
  rows = [
    row(num_features=size, inputs=layer)
    for size in (32, 64)
    for layer in ("a/layer_0", "a/layer_1")
  ]
  assert names(tmp_path, rows) == [
    "error_vs_features_a_layer_0_256.png",
    "error_vs_features_a_layer_1_256.png",
  ]


@pytest.mark.parametrize("error", [0.0, float("nan"), float("inf")])
def test_errors_that_have_no_logarithm(tmp_path, error):
  rows = [
    row(pair, size, error if pair == "b-x" else 0.3, scale=scale)
    for pair in ("a-x", "b-x")
    for size in (32, 64)
    for scale in (0.5, 1.0)
  ]
  assert names(tmp_path, rows) == ALL


def test_the_best_are_shown_if_there_are_many():
  count = plots.MOST_LINES + 3
  rows = [row(f"c{i}-x", error=0.9 - 0.01 * i) for i in range(count)]
  styles = plots._styles(settings_of(rows))
  assert set(styles) == {f"c{i}-x" for i in range(3, count)}
  looks = {(style["color"], style["marker"]) for style in styles.values()}
  assert len(looks) == len(styles)


def test_titles_stay_inside_of_narrow_pictures(tmp_path, monkeypatch):
  edges = []

  def save(figure, *args, **kwargs):
    savefig(figure, *args, **kwargs)
    box = figure.texts[0].get_window_extent()
    edges.append((box.x0, figure.bbox.width - box.x1))

  savefig = Figure.savefig
  monkeypatch.setattr(Figure, "savefig", save)
  rows = [row(), row("relu-none", None)]
  assert names(tmp_path, rows) == ALL[2:]
  assert min(edges[0]) > 0.0
