"""Draws which pairs are exact: ``python docs/draw_hybrid.py``."""

import pathlib

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LENGTH, LEFT, SINKS, HEAVY = 40, 4, (0, 1), (13, 27)
KINDS = {
  "hidden": "#FFFFFF",
  "by features": "#D6E6F2",
  "near: exact": "#0072B2",
  "sink: exact": "#E69F00",
  "heavy: exact": "#D55E00",
}


def kinds_of_pairs(*, is_causal: bool) -> np.ndarray:
  """Returns the place in `KINDS` of each pair, ``[T, T]``."""
  query, key = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
  kinds = np.ones((LENGTH, LENGTH), int)
  kinds[np.abs(query - key) <= LEFT] = 2
  kinds[:, list(SINKS)] = 3
  if is_causal:
    kinds[query < key] = 0
  else:
    kinds[:, list(HEAVY)] = 4
  return kinds


def main() -> None:
  """Writes hybrid.png beside this file."""
  figure, axes = plt.subplots(1, 2, figsize=(8, 5), layout="constrained")
  colors = ListedColormap(list(KINDS.values()))
  titles = (
    "window=4, num_sinks=2, num_heavy=2",
    "is_causal=True, window=4, num_sinks=2",
  )
  for ax, title, is_causal in zip(axes, titles, (False, True), strict=True):
    kinds = kinds_of_pairs(is_causal=is_causal)
    ax.imshow(kinds, cmap=colors, vmin=0, vmax=len(KINDS) - 1)
    ax.set(title=title, xlabel="key", ylabel="query", xticks=[], yticks=[])
  names = [*KINDS.items()][1:]
  patches = [Patch(color=color, label=name) for name, color in names]
  figure.legend(handles=patches, loc="outside lower center", ncols=len(names))
  figure.savefig(pathlib.Path(__file__).with_name("hybrid.png"), dpi=110)


if __name__ == "__main__":
  main()
