"""Draws a sweep: heat maps, costs with Pareto fronts, learning curves.

  python -m spectraformer_jax.study plot runs/s --out=docs/results/s

Takes several folders, or archives, like the command `table`.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectraformer_jax import commands, list_components, list_weight_matrices
from spectraformer_jax.study import figures
from spectraformer_jax.study.sweep.comparison import Comparison, Entry, compare
from spectraformer_jax.study.sweep.runs import Run, group, read_runs, time_unit

# Seven colours in four line styles give 28 looks.
COLOURS = (figures.BLUE, figures.VERMILION, figures.GREEN, figures.PURPLE)
COLOURS += (figures.ORANGE, figures.SKY, figures.BLACK)
STYLES = ("-", "--", ":", "-.")
# Colours of the attentions on the Pareto front, and of the others.
FRONT, REST = figures.VERMILION, figures.BLUE
LABEL_SIZE = 7.5
INCHES_PER_LABEL = 0.16
# The line from a point to its label.
LEADER = {"arrowstyle": "-", "lw": 0.7, "alpha": 0.6, "relpos": (0.0, 0.5)}
LEADER |= {"shrinkA": 1, "shrinkB": 2}


def main(argv: Sequence[str]) -> None:
  """Runs the command."""
  parser = commands.Parser("spectraformer_jax.study plot", __doc__)
  parser.add_argument("folder", nargs="+", help="of the sweep, or its archive")
  parser.add_argument("--out", required=True, help="folder of the pictures")
  args = parser.parse_args(argv)
  runs, _ = read_runs(args.folder)
  comparison, out = compare(runs), Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  for task in comparison.tasks:
    for name, figure in (
      ("heatmap", heat_map(comparison, task)),
      ("time", times(comparison, task)),
      ("memory", memory(comparison, task)),
      ("curves", curves(comparison, task)),
    ):
      if figure is not None:
        path = out / f"{name}-{task}.png"
        figure.savefig(path)
        print(path)


def _entries(comparison: Comparison, task: str) -> dict[str, Entry]:
  """Returns attention -> entry of the task, sorted by name."""
  entries = (comparison.entries.get((n, task)) for n in comparison.attentions)
  return {e.attention: e for e in sorted(filter(None, entries))}


def pair_of(attention: str) -> tuple[str, str] | None:
  """Returns component and matrix of a pair's name; None for another label.

  Example:
    >>> pair_of("oprf-orf"), pair_of("softmax")
    (('oprf', 'orf'), None)
  """
  component, _, matrix = attention.partition("-")
  known = component in list_components() and matrix in list_weight_matrices()
  return (component, matrix) if known else None


def heat_map(comparison: Comparison, task: str) -> Figure | None:
  """Accuracy by component and matrix, as in the paper; None without pairs."""
  pairs = {
    pair: entry
    for attention, entry in _entries(comparison, task).items()
    if (pair := pair_of(attention))
  }
  if not pairs:
    return None
  components = sorted({component for component, _ in pairs})
  matrices = sorted({matrix for _, matrix in pairs})
  grid = [
    [pairs[c, m].accuracy if (c, m) in pairs else math.nan for m in matrices]
    for c in components
  ]
  figure = figures.new_figure(
    2.6 + 1.0 * len(matrices), 1.6 + 0.55 * len(components)
  )
  axes = figure.subplots()
  axes.set_facecolor("#dddddd")  # pairs that the sweep lacks
  image = axes.imshow(grid, cmap="cividis", aspect="auto")
  axes.set_xticks(range(len(matrices)), matrices, rotation=30, ha="right")
  axes.set_yticks(range(len(components)), components)
  axes.set(xlabel="weight matrix", ylabel="component function")
  figure.suptitle(f"{task}: test accuracy, %", fontsize=10)
  axes.spines[:].set_visible(False)
  accuracies = [entry.accuracy for entry in pairs.values()]
  middle = (min(accuracies) + max(accuracies)) / 2
  for (component, matrix), entry in pairs.items():
    sd = "" if entry.accuracy_sd is None else f"\n± {entry.accuracy_sd:.2f}"
    colour = "white" if entry.accuracy <= middle else "black"
    x, y = matrices.index(matrix), components.index(component)
    text = f"{entry.accuracy:.2f}{sd}"
    axes.text(x, y, text, color=colour, **figures.CENTRED)
  figure.colorbar(image)
  return figure


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
  """Returns the names that no other beats in cost and accuracy, cheapest first.

  Args:
    points: name -> (cost, accuracy); accuracies that differ only by rounding
      count as equal.

  Example:
    >>> pareto_front({"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (3.0, 6.0)})
    ['a', 'c']
  """
  front: list[str] = []
  by_cost = sorted(points, key=lambda name: (points[name][0], -points[name][1]))
  for name in by_cost:
    if not front or points[name][1] > points[front[-1]][1] + 1e-9:
      front.append(name)
  return front


def times(comparison: Comparison, task: str) -> Figure:
  """Draws accuracy against training time, in the unit of the table."""
  symbol, unit = time_unit(comparison.runs)
  label = {"h": "hours", "min": "minutes"}[symbol]
  time_of = lambda run: run.seconds / unit
  return _costs(comparison, task, time_of, f"training time, {label}")


def memory(comparison: Comparison, task: str) -> Figure:
  """Draws accuracy against peak memory."""
  gigabytes_of = lambda run: run.peak_bytes / 1e9
  return _costs(comparison, task, gigabytes_of, "peak memory, GB")


def _costs(
  comparison: Comparison, task: str, cost: Callable[[Run], float], label: str
) -> Figure:
  """Draws accuracy against mean cost of attentions, with the Pareto front."""
  entries, groups = _entries(comparison, task), group(comparison.runs)
  points = {
    name: (statistics.fmean(map(cost, groups[name, task])), entry.accuracy)
    for name, entry in entries.items()
  }
  front = pareto_front(points)
  colours = {name: FRONT if name in front else REST for name in points}
  figure, axes = _labelled_figure(7.5, len(points))
  corners = [points[name] for name in front]
  # The best accuracy for at most a given cost is a staircase.
  axes.step(*zip(*corners, strict=True), where="post", color=FRONT, lw=1.2)
  for name, (x, y) in points.items():
    axes.errorbar(
      x,
      y,
      yerr=entries[name].accuracy_sd or 0.0,
      fmt="o" if pair_of(name) else "s",
      color=colours[name],
      ms=5,
      elinewidth=0.8,
      zorder=3,
    )
  axes.set_xscale("log")
  _plain_log_ticks(axes, [x for x, _ in points.values()])
  axes.set(xlabel=label, ylabel="test accuracy, %")
  figure.suptitle(
    f"{task} (circles: pairs, squares: baselines; orange: Pareto front; "
    "bars: standard deviation over seeds)",
    fontsize=8,
  )
  figures.open_frame(axes)
  labels = [(*points[name], name, colours[name], "-") for name in points]
  margin_labels(figure, axes, labels)
  return figure


def _labelled_figure(width: float, labels: int) -> tuple[Figure, Axes]:
  """Makes a figure high enough for that many labels in the margin."""
  figure = figures.new_figure(width, max(4.0, 1.2 + INCHES_PER_LABEL * labels))
  return figure, figure.subplots()


def _plain_log_ticks(axes: Axes, values: Sequence[float]) -> None:
  """Sets limits and ticks of x; a power of ten may not be in the range."""
  low, high = math.log10(min(values)), math.log10(max(values))
  if high - low < 0.05:  # nearly equal values: widen the range
    low, high = low - 0.05, high + 0.05
  edge = 0.06 * (high - low)
  axes.set_xlim(10 ** (low - edge), 10 ** (high + edge))
  ticks = [10 ** (low + i * (high - low) / 4) for i in range(5)]
  ticks = sorted({float(f"{tick:.2g}") for tick in ticks})
  axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
  axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.xaxis.set_minor_locator(ticker.NullLocator())


def curves(comparison: Comparison, task: str) -> Figure:
  """Draws dev accuracy against the step: mean and range over seeds."""
  found = [n for n in comparison.attentions if (n, task) in comparison.entries]
  figure, axes = _labelled_figure(8.0, len(found))
  ends = []
  for name in found:
    # The place among all attentions gives the same look in every task.
    i = comparison.attentions.index(name)
    colour = COLOURS[i % len(COLOURS)]
    style = STYLES[i // len(COLOURS) % len(STYLES)]
    by_step: dict[int, list[float]] = {}
    for run in comparison.runs:
      for row in run.rows if (run.attention, run.task) == (name, task) else ():
        if "dev/accuracy" in row:
          by_step.setdefault(row["step"], []).append(100 * row["dev/accuracy"])
    steps = sorted(by_step)
    means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
    axes.plot(steps, means, lw=1.3, color=colour, ls=style)
    least, most = (
      [limit(by_step[step]) for step in steps] for limit in (min, max)
    )
    axes.fill_between(steps, least, most, color=colour, alpha=0.1, lw=0)
    ends.append((steps[-1], means[-1], name, colour, style))
  axes.set(xlabel="step", ylabel="dev accuracy, %")
  figure.suptitle(
    f"{task} (mean over seeds; band: least to most of them)", fontsize=8
  )
  axes.margins(x=0.02)
  figures.open_frame(axes)
  margin_labels(figure, axes, ends)
  return figure


def margin_labels(
  figure: Figure,
  axes: Axes,
  points: Sequence[tuple[float, float, str, str, str]],
) -> None:
  """Names the points in a column on the right, each joined by a thin line.

  Labels are in the order of the points' heights and at least a line apart, so
  no two overlap, however close the points are.

  Args:
    figure: has no other axes than these.
    axes: with their final limits.
    points: x, y, text, colour, line style.
  """
  points = sorted(points, key=lambda point: point[1])
  low, high = axes.get_ylim()
  axes.set_ylim(low, high)
  heights = [(y - low) / (high - low) for _, y, *_ in points]
  axes_inches = 0.8 * figure.get_figheight()
  places = spread_out(heights, INCHES_PER_LABEL / axes_inches)
  for (x, y, text, colour, style), place in zip(points, places, strict=True):
    axes.annotate(
      text,
      xy=(x, y),
      xytext=(1.1, place),
      textcoords="axes fraction",
      va="center",
      fontsize=LABEL_SIZE,
      color=colour,
      annotation_clip=False,
      arrowprops={**LEADER, "color": colour, "ls": style},
    )


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
  """Moves sorted heights, from 0 to 1, at least `gap` apart.

  Example:
    >>> [round(y, 2) for y in spread_out([0.5, 0.5, 0.9], 0.1)]
    [0.5, 0.6, 0.9]
  """
  places: list[float] = []
  for height in heights:
    places.append(max([height, *(y + gap for y in places[-1:])]))
  # Heights above the top come back down, as far as there is room.
  ceiling = max(1.0, gap * (len(places) - 1))
  for i in reversed(range(len(places))):
    places[i] = min(places[i], ceiling)
    ceiling = places[i] - gap
  return places
