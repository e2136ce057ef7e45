"""Pictures of a conversion: errors of the layers, and courses of the fits."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from spectraformer_jax.linearize.runs.outcome import (
  FITTED,
  START,
  LayerFigures,
)
from spectraformer_jax.study import figures

GREY = "#999999"
COLOURS = (figures.ORANGE, figures.SKY)


def draw(layers: Sequence[LayerFigures], out: Path) -> list[Path]:
  """Draws layers.png and, if there was a fit, losses.png; returns the files."""
  pictures = {"layers": _draw_layers(layers)}
  if any(len(found.layer.report.losses) for found in layers):
    pictures["losses"] = _draw_losses(layers)
  written = []
  for name, figure in pictures.items():
    path = out / f"{name}.png"
    partial = out / f".{path.name}.partial"
    figure.savefig(partial, format="png")
    partial.replace(path)
    written.append(path)
  return written


def _draw_layers(layers: Sequence[LayerFigures]) -> Figure:
  """Draws a group of bars for each layer, one for each map."""
  landmarks = list(layers[0].landmarks)
  colours = {"uniform": GREY} | dict(zip(landmarks, COLOURS, strict=True))
  colours |= {START: figures.GREEN, FITTED: figures.BLUE}
  errors = {"uniform": [x.certificate.uniform_error for x in layers]}
  for name in (*landmarks, START, FITTED):
    if all(name in x.by_map for x in layers):
      errors[name] = [x.by_map[name].error_all for x in layers]
  figure = figures.new_figure(max(5.0, 1.6 + 1.3 * len(layers)), 3.6)
  axes = figure.subplots()
  places, width = np.arange(len(layers)), 0.8 / len(errors)
  for number, (name, values) in enumerate(errors.items()):
    offset = (number - (len(errors) - 1) / 2) * width
    label = f"{name}, not fitted" if name in landmarks else name
    axes.bar(places + offset, values, width, color=colours[name], label=label)
  axes.set_xticks(places, [x.layer.name for x in layers])
  axes.set_ylabel("relative error of the output")
  axes.set_title("Error of each layer on held-out sequences", fontsize=11)
  figures.open_frame(axes)
  axes.set_axisbelow(True)
  axes.legend(
    frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
  )
  return figure


def _draw_losses(layers: Sequence[LayerFigures]) -> Figure:
  """Draws the held-out loss of each layer against the step."""
  figure = figures.new_figure(6.0, 3.6)
  axes = figure.subplots()
  shades = colormaps["viridis"](np.linspace(0.0, 0.9, len(layers)))
  for found, colour in zip(layers, shades, strict=True):
    report = found.layer.report
    axes.plot(
      report.checked_steps,
      report.held_out,
      color=colour,
      marker="o",
      ms=3,
      lw=1.5,
      label=found.layer.name,
    )
    axes.plot(
      report.best_step, report.best_loss, "*", color=colour, ms=11, mec="white"
    )
  axes.set(xlabel="step", ylabel="held-out loss (nats)", yscale="log")
  axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
  axes.yaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
  axes.set_title("Fits; a star is what was taken", fontsize=11)
  figures.open_frame(axes)
  axes.legend(
    frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
  )
  return figure
