"""Pictures of measured errors."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from spectraformer_jax.study import figures
from spectraformer_jax.study.approximation.pair_spec import parse_pair
from spectraformer_jax.study.approximation.results import Measurement
from spectraformer_jax.study.approximation.settings import Setting, over_uniform

# Markers and dashes tell lines apart in a grey print.
COLOURS = (figures.BLUE, figures.VERMILION, figures.GREEN, figures.PURPLE)
COLOURS += (figures.SKY, figures.ORANGE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--")
MOST_LINES = len(MARKERS)
LEAST = 1e-9  # replaces zero in logarithms
LETTERS_PER_INCH = 11  # of a title
_TITLES = {
  "error_vs_features": "Error of attention against number of features",
  "error_vs_scale": "Error of attention against scale of queries and keys",
  "heat_map": "Error of attention over that of uniform attention",
}


def draw(settings: Sequence[Setting], folder: Path) -> list[Path]:
  """Draws the pictures that the settings allow, for each layer and length.

  Returns:
    The files: error_vs_features (needs two sizes), error_vs_scale (two scales),
    heat_map (two pairs).
  """
  groups: dict[tuple[str, int], list[Setting]] = {}
  for setting in settings:
    groups.setdefault((setting.inputs, setting.length), []).append(setting)
  written = []
  for (inputs, length), group in groups.items():
    suffix = "" if len(groups) == 1 else f"_{inputs}_{length}".replace("/", "_")
    for name, figure in (
      ("error_vs_features", _draw_features(group)),
      ("error_vs_scale", _draw_scales(group)),
      ("heat_map", _draw_heat_maps(group)),
    ):
      if figure is not None:
        path = folder / f"{name}{suffix}.png"
        title = f"{_TITLES[name]} ({inputs}, length {length})"
        count = len(group[0].pairs)
        if name != "heat_map" and count > MOST_LINES:
          title += f"\n{MOST_LINES} best of {count} pairs"
        # Breaks the title into lines that fit the width of the figure.
        width = int(LETTERS_PER_INCH * figure.get_figwidth())
        lines = [textwrap.fill(line, width) for line in title.split("\n")]
        figure.suptitle("\n".join(lines))
        partial = folder / f".{path.name}.partial"
        figure.savefig(partial, format="png")
        partial.replace(path)
        written.append(path)
  return written


def _draw_features(group: list[Setting]) -> Figure | None:
  """Error against M with its fit, one panel for each scale."""
  if max(len(setting.sizes) for setting in group) < 2:
    return None
  figure, panels = _panels(len(group), 6.4, 3.4)
  for axes, setting in zip(panels, group, strict=True):
    for pair, style in _styles(group).items():
      rows, colour = setting.of_pair(pair), style["color"]
      sizes = [size for row in rows if (size := row.key.num_features)]
      if not sizes:
        error = rows[0].figures.error
        axes.axhline(error, label=pair, color=colour, ls=":", lw=1.5)
        continue
      fit = setting.slope(pair)
      label = pair
      if fit:
        label = rf"{pair}  $\propto M^{{{fit.slope:.2f}}}$"
        line = np.exp(fit.intercept) * np.power(sizes, fit.slope)
        axes.plot(sizes, line, color=colour, lw=0.8, alpha=0.6)
      _errorbar(axes, sizes, rows, {**style, "ls": ""}, label)
    axes.axhline(
      setting.uniform_error, color="black", lw=2, label="uniform attention"
    )
    _finish(axes, "number of features M", setting.sizes)
    axes.set_title(f"scale {setting.scale:g}", fontsize=10)
  return figure


def _draw_scales(group: list[Setting]) -> Figure | None:
  """Error against scale, for the largest M of each pair."""
  if len(group) < 2:
    return None
  figure, (axes,) = _panels(1, 6.8, 4.2)
  group = sorted(group, key=lambda setting: setting.scale)
  scales = [setting.scale for setting in group]
  for pair, style in _styles(group).items():
    rows = [setting.largest(pair) for setting in group]
    size = rows[0].key.num_features
    label = pair if size is None else f"{pair}, M = {size}"
    _errorbar(axes, scales, rows, style, label)
  uniform = [setting.uniform_error for setting in group]
  axes.plot(scales, uniform, color="black", lw=2, label="uniform attention")
  _finish(axes, "scale of queries and keys", scales)
  top = axes.get_ylim()[1]
  axes.fill_between(scales, uniform, top, color="black", alpha=0.06, lw=0)
  axes.set_ylim(top=top)
  axes.set_title("shaded: worse than ignoring queries and keys", fontsize=9)
  return figure


def _draw_heat_maps(group: list[Setting]) -> Figure | None:
  """Error over uniform error, component by matrix, one panel for each scale."""
  if len(group[0].pairs) < 2:
    return None
  parsed = {name: parse_pair(name) for name in group[0].pairs}
  components = list(dict.fromkeys(p.component for p in parsed.values()))
  matrices = list(dict.fromkeys(p.matrix for p in parsed.values()))
  figure, panels = _panels(
    len(group), 2.2 + 0.62 * len(matrices), 1.5 + 0.4 * len(components)
  )
  row_names, column_names = (
    [name.replace("(", "\n(") for name in names]
    for names in (components, matrices)
  )
  for axes, setting in zip(panels, group, strict=True):
    axes.set_facecolor("#d9d9d9")  # pairs without a measurement
    ratios = np.full((len(components), len(matrices)), np.nan)
    for name, pair in parsed.items():
      place = components.index(pair.component), matrices.index(pair.matrix)
      ratios[place] = over_uniform(setting.largest(name))
    # The range is fixed: blue is always better than uniform attention.
    axes.imshow(
      np.log10(np.maximum(ratios, LEAST)),
      cmap="RdBu_r",
      vmin=-1.0,
      vmax=1.0,
      aspect="auto",
    )
    for (i, j), ratio in np.ndenumerate(ratios):
      if math.isfinite(ratio):
        text = f"{ratio:.2g}" if ratio < 10.0 else f"{ratio:.0f}"
        colour = "black" if 0.25 < ratio < 4.0 else "white"
        axes.text(j, i, text, color=colour, **figures.CENTRED)
    axes.set_xticks(
      range(len(matrices)), column_names, rotation=40, ha="right", fontsize=8
    )
    axes.set_yticks(range(len(components)), row_names, fontsize=8)
    axes.set_title(
      f"scale {setting.scale:g}, M = {_largest_sizes(setting)}", fontsize=10
    )
  image = panels[0].images[0]
  bar = figure.colorbar(image, ax=panels, shrink=0.8, extend="both")
  bar.set_ticks(
    np.log10([0.1, 0.3, 1, 3, 10]).tolist(),
    labels=["0.1", "0.3", "1", "3", "10"],
  )
  return figure


def _panels(
  count: int, width: float, height: float
) -> tuple[Figure, list[Axes]]:
  """Makes a figure with `count` axes, at most two in a row."""
  columns = min(count, 2)
  rows = -(-count // columns)
  figure = figures.new_figure(columns * width + 0.6, rows * height + 0.5)
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for unused in axes[count:]:
    unused.set_visible(False)
  return figure, axes[:count]


def _styles(group: list[Setting]) -> dict[str, dict[str, Any]]:
  """The pairs to show and their looks, the same in all panels.

  If there are too many pairs, shows those that are best on average over the
  panels.
  """
  pairs = group[0].pairs
  if len(pairs) > MOST_LINES:
    pairs = sorted(pairs, key=lambda pair: _mean_log_error(group, pair))
  return {
    pair: {
      "color": COLOURS[i % len(COLOURS)],
      "marker": MARKERS[i],
      "ls": DASHES[i // len(COLOURS)],
    }
    for i, pair in enumerate(pairs[:MOST_LINES])
  }


def _mean_log_error(group: list[Setting], pair: str) -> float:
  """Mean log of a pair's error over that of uniform attention, at largest M."""
  ratios = [over_uniform(setting.largest(pair)) for setting in group]
  mean = float(np.mean(np.log(np.maximum(ratios, LEAST))))
  return mean if math.isfinite(mean) else math.inf


def _errorbar(
  axes: Axes,
  x: Sequence[Any],
  rows: Sequence[Measurement],
  style: dict[str, Any],
  label: str,
) -> None:
  """Draws points with confidence intervals."""
  errors = [row.figures.error for row in rows]
  intervals = [row.figures.error_ci or 0.0 for row in rows]
  style = {"ms": 4.5, "lw": 1.2, "capsize": 2, **style}
  axes.errorbar(x, errors, yerr=intervals, label=label, **style)


def _largest_sizes(setting: Setting) -> str:
  """The largest M of the pairs, as text: one number, or a range."""
  sizes = {setting.largest(pair).key.num_features for pair in setting.pairs}
  sizes = sorted(size for size in sizes if size is not None)
  if not sizes:
    return "-"
  return " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))


def _finish(axes: Axes, xlabel: str, ticks: Sequence[float]) -> None:
  """Makes logarithmic axes with plain numbers, and a legend beside them."""
  axes.set(xscale="log", yscale="log", xlabel=xlabel)
  axes.set_ylabel("relative error of the output")
  axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
  axes.xaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
  axes.yaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
  figures.open_frame(axes)
  beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
  axes.legend(frameon=False, fontsize=8, **beside)
