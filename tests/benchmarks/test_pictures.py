"""Pictures of measurements are written."""

import matplotlib.image
import pytest

from benchmarks import pictures

POINTS = [(1024, 20.0), (256, 3.0)]


def test_lines(tmp_path):
  panel = pictures.Panel({"ours": POINTS, "none": []}, "T", "ms", "title")
  noted = pictures.Panel({"ours": POINTS}, notes={"ours": ", 1.4"})
  path = tmp_path / "lines.png"
  pictures.draw_lines(str(path), [[panel, noted]], size=(4, 2))
  assert matplotlib.image.imread(path).shape == (220, 440, 4)


def test_attention_panel_has_the_rows_of_its_case():
  case = {"is_causal": True, "batch": 1}
  rows = [
    {"form": "ours", "length": 256, "ms": 3.0, **case},
    {"form": "ours", "length": 512, "ms": 0.0, **case},
    {"form": "ours", "length": 512, "ms": 9.0, **case, "batch": 8},
    {"form": "theirs", "length": 256, "ms": 5.0, **case, "is_causal": False},
  ]
  panel = pictures.attention_panel(rows, "ms", "time", title="causal", **case)
  assert panel.lines == {"ours": [(256, 3.0), (512, 0.01)], "theirs": []}
  assert (panel.y, panel.title) == ("time", "causal")


def test_more_lines_than_can_be_told_apart(tmp_path):
  lines = {str(i): POINTS for i in range(8)}
  with pytest.raises(ValueError, match="at most 7 names in a picture, got 8"):
    pictures.draw_lines(str(tmp_path / "x.png"), [[pictures.Panel(lines)]])


def test_bars(tmp_path):
  path = tmp_path / "bars.png"
  pictures.draw_bars(str(path), {"a": (1.0, 2.0)}, "ms", ("limit", "measured"))
  assert matplotlib.image.imread(path).any()
