"""Pictures: what they show, and that nothing in them overlaps."""

import itertools

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Annotation

from spectraformer_jax.study import __main__ as study
from spectraformer_jax.study.sweep import plots
from spectraformer_jax.study.sweep.comparison import compare
from spectraformer_jax.study.sweep.runs import read_runs
from tests.study.sweep.helpers import write_run, write_sweep

ATTENTIONS = [
  "oprf-orf",
  "posrf-orf",
  "oprf-fastfood_learnable",
  "posrf-mm",
  "softmax",
  "gaussian",
  "linformer",
  "local",
  "nystromformer",
]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sweep")
  write_sweep(folder, ATTENTIONS)
  # Two that lie on top of each other.
  write_sweep(folder, ["skyformer"], tasks=("listops",))
  return compare(read_runs([folder])[0])


def texts(axes):
  """The axes' own texts."""
  return [text.get_text() for text in axes.texts]


def test_the_front_is_what_nothing_beats_in_both():
  points = {
    "cheap": (1.0, 50.0),
    "dear and worse": (2.0, 49.0),
    "dear and equal": (2.0, 50.0),
    "better": (3.0, 60.0),
    "better and dearer": (4.0, 60.0),
    "best": (9.0, 61.0),
  }
  assert plots.pareto_front(points) == ["cheap", "better", "best"]
  points = {"cheap": (1.0, 0.3), "dear": (2.0, 0.1 + 0.2)}
  assert plots.pareto_front(points) == ["cheap"]


def test_heights_are_apart_and_in_order():
  for heights in ([0.5] * 9, [0.98, 0.99, 1.0], [0.0, 0.1, 0.1, 0.9]):
    places = plots.spread_out(heights, 0.1)
    assert np.diff(places).min() > 0.1 - 1e-9
    assert max(places) <= 1.0 + 1e-9 and min(places) >= 0.0
  assert plots.spread_out([0.1, 0.6], 0.1) == [0.1, 0.6]


def test_heat_map_has_each_pair_once_with_its_figure(comparison):
  figure = plots.heat_map(comparison, "listops")
  axes = figure.axes[0]
  assert sorted(texts(axes)) == sorted(
    f"{40.2 + 2 * i:.2f}\n± 0.20" for i in range(4)
  )
  columns = [label.get_text() for label in axes.get_xticklabels()]
  assert columns == ["fastfood_learnable", "mm", "orf"]
  image = axes.images[0].get_array()
  assert image.shape == (2, 3) and np.ma.count_masked(image) == 2
  baselines = [run for run in comparison.runs if "-" not in run.attention]
  assert plots.heat_map(compare(baselines), "listops") is None


def test_costs_name_every_attention_and_mark_the_front(comparison):
  axes = plots.times(comparison, "listops").axes[0]
  assert axes.get_xlabel() == "training time, minutes"
  assert sorted(texts(axes)) == sorted([*ATTENTIONS, "skyformer"])
  colours = {t.get_text(): t.get_color() for t in axes.texts}
  # Each of the made-up ones costs more and is better than the one before.
  assert colours["softmax"] == plots.FRONT
  front = {name for name, colour in colours.items() if colour == plots.FRONT}
  assert front == set(ATTENTIONS)


def test_curves_look_the_same_in_every_task_and_differ_in_one(comparison):
  order = comparison.attentions
  looks = []
  for task in ("listops", "digits"):
    axes = plots.curves(comparison, task).axes[0]
    looks.append(
      {
        text.get_text(): (line.get_color(), line.get_linestyle())
        for text, line in zip(
          sorted(axes.texts, key=lambda t: order.index(t.get_text())),
          axes.lines,
          strict=True,
        )
      }
    )
    line = axes.lines[order.index("softmax")]
    assert list(line.get_xdata()) == [50, 100]
  assert looks[0] | looks[1] == looks[0]
  assert len(set(looks[0].values())) == len(ATTENTIONS) + 1


def test_no_two_texts_overlap_and_none_is_cut_off(comparison):
  for figure in (
    plots.heat_map(comparison, "listops"),
    plots.times(comparison, "listops"),
    plots.curves(comparison, "listops"),
  ):
    figure.draw_without_rendering()
    axes = figure.axes[0]
    ticks = [
      tick
      for axis in (axes.xaxis, axes.yaxis)
      for tick, place in zip(
        axis.get_ticklabels(), axis.get_ticklocs(), strict=True
      )
      if min(axis.get_view_interval()) <= place <= max(axis.get_view_interval())
    ]
    found = [*axes.texts, *figure.texts, axes.xaxis.label, axes.yaxis.label]
    # An annotation's box has its line in it.
    boxes = [
      super(Annotation, t).get_window_extent()
      if isinstance(t, Annotation)
      else t.get_window_extent()
      for t in [*found, *(t for t in ticks if t.get_rotation() == 0)]
      if t.get_text() and t.get_visible()
    ]
    for one, two in itertools.combinations(boxes, 2):
      assert not one.padded(-1).overlaps(two.padded(-1))
    for box in boxes:
      assert box.x0 >= 0 and box.x1 <= figure.bbox.width
      assert box.y0 >= 0 and box.y1 <= figure.bbox.height


def test_the_command_writes_all_pictures(tmp_path, capsys):
  write_run(tmp_path / "s", "digits", "softmax", 0, 0.5)
  write_run(tmp_path / "s", "digits", "oprf-orf", 0, 0.5)
  out = tmp_path / "pictures"
  assert study.main(["plot", f"{tmp_path}/s", f"--out={out}"]) == 0
  names = {"heatmap", "time", "memory", "curves"}
  assert {path.name for path in out.iterdir()} == {
    f"{name}-digits.png" for name in names
  }
  for path in out.iterdir():
    pixels = matplotlib.image.imread(path)
    assert pixels.std() > 0.05, path
