"""Pictures of measured errors."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spectraformer_jax.study.approximation.pair_spec import parse_pair
from spectraformer_jax.study.approximation.settings import Setting, over_uniform

# Okabe and Ito's palette without its yellow, which is faint on white: told
# apart with any colour vision. Markers and dashes tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--")
MOST_LINES = len(MARKERS)
LEAST = 1e-9  # in place of zero, in logarithms
LETTERS_PER_INCH = 11  # of a title


def draw(settings: Sequence[Setting], folder: Path) -> list[Path]:
  """Draws what there is to draw, a set of pictures for each layer and length.

  Returns:
    The files: error_vs_features (two sizes at least), error_vs_scale (two
    scales), heat_map (two pairs).
  """
  groups: dict[tuple, list[Setting]] = {}
  for setting in settings:
    groups.setdefault((setting.inputs, setting.length), []).append(setting)
  written = []
  for (inputs, length), group in groups.items():
    suffix = "" if len(groups) == 1 else f"_{inputs}_{length}"
    suffix = suffix.replace("/", "_")
    for name, function in (
      ("error_vs_features", _draw_features),
      ("error_vs_scale", _draw_scales),
      ("heat_map", _draw_heat_maps),
    ):
      figure = function(group)
      if figure is not None:
        path = folder / f"{name}{suffix}.png"
        title = f"{_TITLES[name]} ({inputs}, length {length})"
        count = len(group[0].pairs)
        if function is not _draw_heat_maps and count > MOST_LINES:
          title += f"\n{MOST_LINES} best of {count} pairs"
        figure.suptitle(_wrapped(title, figure.get_figwidth()))
        partial = folder / f".{path.name}.partial"
        figure.savefig(partial, format="png")
        partial.replace(path)
        written.append(path)
  return written


def _wrapped(title: str, inches: float) -> str:
  """The title in lines that a figure of that width has room for."""
  width = int(LETTERS_PER_INCH * inches)
  return "\n".join(textwrap.fill(x, width) for x in title.split("\n"))


_TITLES = {
  "error_vs_features": "Error of attention against number of features",
  "error_vs_scale": "Error of attention against scale of queries and keys",
  "heat_map": "Error of attention over that of uniform attention",
}


def _draw_features(group):
  """Error against M with its fit, one panel for each scale."""
  if max(len(setting.sizes) for setting in group) < 2:
    return None
  styles = _styles(group)
  figure, panels = _panels(len(group), (6.4, 3.4))
  for axes, setting in zip(panels, group, strict=True):
    for pair, style in styles.items():
      rows = setting.of_pair(pair)
      if rows[0].num_features is None:
        look = {"color": style["color"], "ls": ":", "lw": 1.5}
        axes.axhline(rows[0]["error"], label=pair, **look)
        continue
      sizes = [row.num_features for row in rows]
      fit = setting.slope(pair)
      label = pair
      if fit:
        label = rf"{pair}  $\propto M^{{{fit.slope:.2f}}}$"
        line = np.exp(fit.intercept) * np.power(sizes, fit.slope)
        axes.plot(sizes, line, color=style["color"], lw=0.8, alpha=0.6)
      _errorbar(axes, sizes, rows, {**style, "ls": ""}, label)
    axes.axhline(
      setting.uniform_error, color="black", lw=2, label="uniform attention"
    )
    _finish(axes, "number of features M", setting.sizes)
    axes.set_title(f"scale {setting.scale:g}", fontsize=10)
    _legend_beside(axes)
  return figure


def _draw_scales(group):
  """Error against scale, for the largest M of each pair."""
  if len(group) < 2:
    return None
  figure, (axes,) = _panels(1, (6.8, 4.2))
  group = sorted(group, key=lambda setting: setting.scale)
  scales = [setting.scale for setting in group]
  for pair, style in _styles(group).items():
    rows = [setting.largest(pair) for setting in group]
    size = rows[0].num_features
    label = pair if size is None else f"{pair}, M = {size}"
    _errorbar(axes, scales, rows, style, label)
  uniform = [setting.uniform_error for setting in group]
  axes.plot(scales, uniform, color="black", lw=2, label="uniform attention")
  _finish(axes, "scale of queries and keys", scales)
  top = axes.get_ylim()[1]
  axes.fill_between(scales, uniform, top, color="black", alpha=0.06, lw=0)
  axes.set_ylim(top=top)
  axes.set_title("shaded: worse than ignoring queries and keys", fontsize=9)
  _legend_beside(axes)
  return figure


def _draw_heat_maps(group):
  """Error over uniform error, component by matrix, one panel a scale."""
  if len(group[0].pairs) < 2:
    return None
  parsed = {name: parse_pair(name) for name in group[0].pairs}
  components = list(dict.fromkeys(p.component for p in parsed.values()))
  matrices = list(dict.fromkeys(p.matrix for p in parsed.values()))
  size = 2.2 + 0.62 * len(matrices), 1.5 + 0.4 * len(components)
  figure, panels = _panels(len(group), size)
  lines = lambda names: [name.replace("(", "\n(") for name in names]
  for axes, setting in zip(panels, group, strict=True):
    axes.set_facecolor("#d9d9d9")  # what was not measured
    ratios = np.full((len(components), len(matrices)), np.nan)
    for name, pair in parsed.items():
      place = components.index(pair.component), matrices.index(pair.matrix)
      ratios[place] = over_uniform(setting.largest(name))
    # Blue is better than uniform attention, red worse, whatever the spread.
    image = axes.imshow(
      np.log10(np.maximum(ratios, LEAST)),
      cmap="RdBu_r",
      vmin=-1.0,
      vmax=1.0,
      aspect="auto",
    )
    for (i, j), ratio in np.ndenumerate(ratios):
      if math.isfinite(ratio):
        dark = not 0.25 < ratio < 4.0
        axes.text(
          *(j, i, f"{ratio:.2g}" if ratio < 10.0 else f"{ratio:.0f}"),
          ha="center",
          va="center",
          fontsize=8,
          color="white" if dark else "black",
        )
    axes.set_xticks(
      range(len(matrices)), lines(matrices), rotation=40, ha="right", fontsize=8
    )
    axes.set_yticks(range(len(components)), lines(components), fontsize=8)
    axes.set_title(
      f"scale {setting.scale:g}, M = {_largest_sizes(setting)}", fontsize=10
    )
  bar = figure.colorbar(image, ax=panels, shrink=0.8, extend="both")
  bar.set_ticks(
    np.log10([0.1, 0.3, 1, 3, 10]), labels=["0.1", "0.3", "1", "3", "10"]
  )
  return figure


def _panels(count, size):
  """A figure and that many axes, at most two in a row."""
  # Here, because it takes a second; the backend needs no display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = min(count, 2)
  rows = -(-count // columns)
  width, height = columns * size[0] + 0.6, rows * size[1] + 0.5
  figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
  FigureCanvasAgg(figure)
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  for unused in axes[count:]:
    unused.set_visible(False)
  return figure, axes[:count]


def _styles(group):
  """The pairs that are shown and their looks, the same in all panels.

  If there are too many, those that are best on average over the panels.
  """
  pairs = group[0].pairs
  if len(pairs) > MOST_LINES:
    pairs = sorted(pairs, key=lambda pair: _mean_log_error(group, pair))
    pairs = pairs[:MOST_LINES]
  return {
    pair: {
      "color": COLOURS[i % len(COLOURS)],
      "marker": MARKERS[i % len(MARKERS)],
      "ls": DASHES[i // len(COLOURS)],
    }
    for i, pair in enumerate(pairs)
  }


def _mean_log_error(group, pair):
  """Of the largest M, over the error of uniform attention."""
  ratios = [over_uniform(setting.largest(pair)) for setting in group]
  mean = float(np.mean(np.log(np.maximum(ratios, LEAST))))
  return mean if math.isfinite(mean) else math.inf


def _errorbar(axes, x, rows, style, label):
  """Points with confidence intervals."""
  axes.errorbar(
    x,
    [row["error"] for row in rows],
    yerr=[row["error_ci"] or 0.0 for row in rows],
    label=label,
    ms=4.5,
    lw=1.2,
    capsize=2,
    **style,
  )


def _largest_sizes(setting):
  """The M of each pair's own last row: one number, or a range."""
  sizes = {setting.largest(pair).num_features for pair in setting.pairs}
  sizes = sorted(sizes - {None})
  if not sizes:
    return "-"
  return " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))


def _legend_beside(axes):
  axes.legend(
    frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5)
  )


def _finish(axes, xlabel, ticks):
  """Logarithmic axes with plain numbers."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

  axes.set(xscale="log", yscale="log", xlabel=xlabel)
  axes.set_ylabel("relative error of the output")
  axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
  axes.xaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
  axes.yaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
