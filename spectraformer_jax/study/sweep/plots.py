"""Pictures of a sweep: heat maps, costs with Pareto fronts, learning curves.

python -m spectraformer_jax.study plot runs/s --out=docs/results/s
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spectraformer_jax import list_components, list_weight_matrices
from spectraformer_jax.study.sweep import runs as cell_runs
from spectraformer_jax.study.sweep.runs import Run, Spread
from spectraformer_jax.train.run.writers import read_rows

# Okabe and Ito's palette without its yellow, which is faint on white; with the
# line styles there are 28 looks that any colour vision tells apart.
COLOURS = (
  *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
  *("#E69F00", "#56B4E9", "#000000"),
)
STYLES = ("-", "--", ":", "-.")
FRONT, REST = COLOURS[1], COLOURS[0]
LABEL_SIZE = 7.5
INCHES_PER_LABEL = 0.16


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""
  parser.add_argument("folder", nargs="+", help="of the sweep")
  parser.add_argument("--out", required=True, help="folder of the pictures")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
  runs, _ = cell_runs.read_runs(args.folder)
  out = Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  tasks, attentions = cell_runs.labels(runs)
  for task in tasks:
    for name, figure in (
      (f"heatmap-{task}.png", heat_map(runs, task)),
      (f"time-{task}.png", costs(runs, task, *_time(runs))),
      (
        f"memory-{task}.png",
        costs(runs, task, lambda r: r.peak_bytes / 1e9, "peak memory, GB"),
      ),
      (f"curves-{task}.png", curves(runs, task, attentions)),
    ):
      if figure is not None:
        figure.savefig(out / name)
        print(out / name)
  return 0


def _time(runs: Sequence[Run]) -> tuple[Callable[[Run], float], str]:
  """Training time in the unit that the table takes."""
  if max(run.seconds for run in runs) > 3600:
    return lambda run: run.seconds / 3600, "training time, hours"
  return lambda run: run.seconds / 60, "training time, minutes"


def _figure(width: float, height: float):
  """A figure that needs no display."""
  # Here, because it takes a second.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
  FigureCanvasAgg(figure)
  return figure


def _accuracies(runs: Sequence[Run], task: str) -> dict[str, Spread]:
  """Test accuracy of each attention on the task."""
  return {
    attention: Spread(tuple(run.accuracy for run in found))
    for (name, attention), found in cell_runs.group(runs).items()
    if name == task
  }


def pair_of(attention: str) -> tuple[str, str] | None:
  """Component and matrix of a label that is a pair's name.

  Example:
    >>> pair_of("oprf-orf"), pair_of("softmax")
    (('oprf', 'orf'), None)
  """
  component, _, matrix = attention.partition("-")
  known = component in list_components() and matrix in list_weight_matrices()
  return (component, matrix) if known else None


def heat_map(runs: Sequence[Run], task: str) -> Any:
  """Accuracy by component and matrix, as in the paper; None without pairs."""
  pairs = {
    pair: spread
    for attention, spread in _accuracies(runs, task).items()
    if (pair := pair_of(attention))
  }
  if not pairs:
    return None
  components = sorted({component for component, _ in pairs})
  matrices = sorted({matrix for _, matrix in pairs})
  grid = [
    [pairs[c, m].mean if (c, m) in pairs else math.nan for m in matrices]
    for c in components
  ]
  figure = _figure(2.6 + 1.0 * len(matrices), 1.6 + 0.55 * len(components))
  axes = figure.subplots()
  axes.set_facecolor("#dddddd")  # no such cell
  image = axes.imshow(grid, cmap="cividis", aspect="auto")
  axes.set_xticks(range(len(matrices)), matrices, rotation=30, ha="right")
  axes.set_yticks(range(len(components)), components)
  axes.set(xlabel="weight matrix", ylabel="component function")
  figure.suptitle(f"{task}: test accuracy, %", fontsize=10)
  axes.spines[:].set_visible(False)
  for (component, matrix), spread in pairs.items():
    dark = image.norm(spread.mean) < 0.5
    sd = "" if spread.sd is None else f"\n± {spread.sd:.2f}"
    axes.text(
      matrices.index(matrix),
      components.index(component),
      f"{spread.mean:.2f}{sd}",
      ha="center",
      va="center",
      fontsize=8,
      color="white" if dark else "black",
    )
  figure.colorbar(image)
  return figure


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
  """Names that no other beats in both, cheapest first.

  Args:
    points: name -> (cost, accuracy); accuracies that differ by less than
      rounding are equal.

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


def costs(
  runs: Sequence[Run], task: str, cost: Callable[[Run], float], label: str
) -> Any:
  """Accuracy against a cost, means over seeds, with the Pareto front."""
  grouped = cell_runs.group(runs)
  spreads = _accuracies(runs, task)
  points = {
    name: (
      Spread(tuple(map(cost, grouped[task, name]))).mean,
      spread.mean,
    )
    for name, spread in spreads.items()
  }
  front = pareto_front(points)
  figure = _figure(7.5, max(4.0, 1.2 + INCHES_PER_LABEL * len(points)))
  axes = figure.subplots()
  corners = [points[name] for name in front]
  # The best for at most this cost: a staircase.
  axes.step(*zip(*corners, strict=True), where="post", color=FRONT, lw=1.2)
  for name, (x, y) in points.items():
    axes.errorbar(
      x,
      y,
      yerr=spreads[name].sd or 0.0,
      fmt="o" if pair_of(name) else "s",
      color=FRONT if name in front else REST,
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
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  margin_labels(
    axes,
    [
      (x, y, name, FRONT if name in front else REST, "-")
      for name, (x, y) in points.items()
    ],
  )
  return figure


def _plain_log_ticks(axes, values: Sequence[float]) -> None:
  """Some ticks as plain numbers: a decade's powers alone may be none."""
  from matplotlib import ticker

  low, high = math.log10(min(values)), math.log10(max(values))
  if high - low < 0.05:  # all but equal: give them room
    low, high = low - 0.05, high + 0.05
  edge = 0.06 * (high - low)
  axes.set_xlim(10 ** (low - edge), 10 ** (high + edge))
  ticks = [10 ** (low + i * (high - low) / 4) for i in range(5)]
  ticks = sorted({float(f"{tick:.2g}") for tick in ticks})
  axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
  axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.xaxis.set_minor_locator(ticker.NullLocator())


def curves(runs: Sequence[Run], task: str, attentions: Sequence[str]) -> Any:
  """Dev accuracy against the step: mean over seeds, band from least to most."""
  grouped = cell_runs.group(runs)
  found = [name for name in attentions if (task, name) in grouped]
  figure = _figure(8.0, max(4.0, 1.2 + INCHES_PER_LABEL * len(found)))
  axes = figure.subplots()
  ends = []
  for name in found:
    # By place among all attentions: the same look in every task.
    i = attentions.index(name)
    look = {
      "color": COLOURS[i % len(COLOURS)],
      "ls": STYLES[i // len(COLOURS) % len(STYLES)],
    }
    by_step: dict[int, list[float]] = {}
    for run in grouped[task, name]:
      for row in read_rows(run.folder):
        if "dev/accuracy" in row:
          by_step.setdefault(row["step"], []).append(100 * row["dev/accuracy"])
    steps = sorted(by_step)
    means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
    axes.plot(steps, means, lw=1.3, **look)
    axes.fill_between(
      steps,
      [min(by_step[step]) for step in steps],
      [max(by_step[step]) for step in steps],
      color=look["color"],
      alpha=0.1,
      lw=0,
    )
    ends.append((steps[-1], means[-1], name, *look.values()))
  axes.set(xlabel="step", ylabel="dev accuracy, %")
  figure.suptitle(
    f"{task} (mean over seeds; band: least to most of them)", fontsize=8
  )
  axes.margins(x=0.02)
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  margin_labels(axes, ends)
  return figure


def margin_labels(
  axes, points: Sequence[tuple[float, float, str, str, str]]
) -> None:
  """Names the points in a column on the right, each by a thin line.

  In order of height and at least a line apart, so no two overlap however close
  the points are.

  Args:
    axes: limits must be final.
    points: x, y, text, colour, line style.
  """
  points = sorted(points, key=lambda point: point[1])
  low, high = axes.get_ylim()
  axes.set_ylim(low, high)
  heights = [(y - low) / (high - low) for _, y, *_ in points]
  axes_inches = 0.8 * axes.figure.get_size_inches()[1]
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
      arrowprops={
        "arrowstyle": "-",
        "color": colour,
        "lw": 0.7,
        "ls": style,
        "alpha": 0.6,
        "relpos": (0.0, 0.5),
        "shrinkA": 1,
        "shrinkB": 2,
      },
    )


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
  """Sorted heights moved to be at least `gap` apart, around 0 to 1.

  Example:
    >>> [round(y, 2) for y in spread_out([0.5, 0.5, 0.9], 0.1)]
    [0.5, 0.6, 0.9]
  """
  places: list[float] = []
  for height in heights:
    places.append(max([height, *(y + gap for y in places[-1:])]))
  # What was pushed out at the top comes back down, as far as there is room.
  ceiling = max(1.0, gap * (len(places) - 1))
  for i in reversed(range(len(places))):
    places[i] = min(places[i], ceiling)
    ceiling = places[i] - gap
  return places
