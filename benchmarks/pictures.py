"""Pictures of the benchmarks' measurements."""

from collections.abc import Sequence
from typing import NamedTuple

# Looks that can be told apart in a grey print and with any colour vision.
_STYLES = (
  ("#0072B2", "o", "-"),
  ("#E69F00", "s", "--"),
  ("#D55E00", "^", "-."),
  ("#666666", "v", ":"),
  ("#009E73", "D", "--"),
  ("#CC79A7", "P", "-."),
  ("#56B4E9", "X", ":"),
)


class Panel(NamedTuple):
  """One pair of axes, both logarithmic.

  Attributes:
    lines: name -> points (x, y); lines without points are left out.
    x: label of the x axis.
    y: label of the y axis.
    title: above the panel.
    notes: name -> text behind the name in this panel's legend.
  """

  lines: dict[str, Sequence[tuple[float, float]]]
  x: str = ""
  y: str = ""
  title: str = ""
  notes: dict[str, str] | None = None


def attention_panel(
  rows: Sequence[dict],
  figure: str,
  y: str,
  *,
  title: str,
  **case: bool | int,
) -> Panel:
  """Makes a panel of one measured figure against length, a line for each form.

  Args:
    rows: dicts with form, length, the keys of `case`, and `figure`.
    figure: name of the measured figure; values below 0.01 are drawn at 0.01,
      since 0 has no logarithm.
    y: name and unit of the measured figure.
    title: of the panel.
    **case: is_causal, backward and batch of the rows to draw.
  """
  lines = {row["form"]: [] for row in rows}
  for row in rows:
    if case.items() <= row.items():
      lines[row["form"]].append((row["length"], max(row[figure], 1e-2)))
  return Panel(lines, "length T", y, title)


def draw_lines(
  path: str,
  panels: Sequence[Sequence[Panel]],
  *,
  title: str | None = None,
  size: tuple[float, float] = (10, 7),
) -> None:
  """Writes a picture of rows of panels.

  A name has the same colour in all panels. The legend of a panel has the names
  that no panel before it has shown, and those with a note.

  Raises:
    ValueError: more names than there are styles.
  """
  plt = _pyplot()
  from matplotlib import ticker

  names = list(
    dict.fromkeys(
      name for row in panels for panel in row for name in panel.lines
    )
  )
  if len(names) > len(_STYLES):
    raise ValueError(
      f"at most {len(_STYLES)} names in a picture, got {len(names)}."
    )
  styles = dict(zip(names, _STYLES, strict=False))
  figure, axes = plt.subplots(
    len(panels), len(panels[0]), figsize=size, squeeze=False
  )
  shown = set()
  for line, row in zip(axes, panels, strict=True):
    for ax, panel in zip(line, row, strict=True):
      for name, points in panel.lines.items():
        if not points:
          continue
        colour, marker, dash = styles[name]
        note = (panel.notes or {}).get(name, "")
        ax.plot(
          *zip(*sorted(points), strict=True),
          color=colour,
          marker=marker,
          linestyle=dash,
          label=f"{name}{note}" if note or name not in shown else None,
        )
        shown.add(name)
      ax.set_xscale("log", base=2)
      ax.set_yscale("log")
      low, high = ax.get_ylim()
      ax.yaxis.set_major_locator(
        ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
      )
      ax.yaxis.set_major_formatter("{x:,g}")
      ax.yaxis.set_minor_formatter(ticker.NullFormatter())
      ax.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
      ax.grid(alpha=0.3)
      if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, fontsize=8)
  if title:
    figure.suptitle(title)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def draw_bars(
  path: str, bars: dict[str, tuple[float, float]], x: str, labels: Sequence[str]
) -> None:
  """Writes a picture of two bars for each name, the first one on top."""
  plt = _pyplot()
  figure, ax = plt.subplots(figsize=(8, 0.4 * len(bars) + 1))
  places = range(len(bars))
  for offset, label, values, colour in zip(
    (-0.2, 0.2),
    labels,
    zip(*bars.values(), strict=True),
    ("#999999", "#0072B2"),
    strict=True,
  ):
    ax.barh(
      [place + offset for place in places],
      values,
      0.4,
      label=label,
      color=colour,
    )
  ax.set_yticks(places, bars)
  ax.invert_yaxis()
  ax.set_xlabel(x)
  ax.grid(axis="x", alpha=0.3)
  ax.legend(frameon=False)
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  plt.close(figure)


def _pyplot():
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  return plt
