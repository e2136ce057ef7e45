"""Colours, figures and frames of the pictures of both studies."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, without its yellow, which is faint on white. These
# colours can be told apart with any colour vision.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, BLACK = "#56B4E9", "#E69F00", "#000000"
# Text in a cell of a heat map.
CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}


def new_figure(width: float, height: float) -> Figure:
  """Makes an empty figure, sizes in inches; needs no display."""
  return Figure(figsize=(width, height), layout="constrained", dpi=150)


def open_frame(axes: Axes) -> None:
  """Draws a grid, and no frame at the top and on the right."""
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
