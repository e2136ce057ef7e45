"""Writes what the registries know: two tables and the picture of all pairs.

    python docs/make_tables.py

Makes docs/components.md, docs/weight_matrices.md and docs/pairs.png from the
`info` of every entry. Run it after adding or changing one; a test compares.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

import spectraformer_jax as sf
from spectraformer_jax.components import COMPONENTS
from spectraformer_jax.feature_maps.compose import mismatch
from spectraformer_jax.testing.checks import FAMILIES, GROUPS
from spectraformer_jax.weight_matrices import WEIGHT_MATRICES

FOLDER = pathlib.Path(__file__).parent
COMMAND = "python docs/make_tables.py"

# Status of a pair -> colour (Okabe and Ito, safe for colour-blind readers; each
# also has its own letter) and meaning.
STATUSES = {
  "E": ("#009E73", "exact: unbiased, every row has the right law"),
  "W": ("#56B4E9", "weighted: unbiased with its row weights"),
  "A": ("#E69F00", "approximate rows: biased, see W's docstring"),
  "L": ("#CC79A7", "learnt rows: exact when initialised"),
  "K": ("#F0E442", "learnt kernel: its own, with nothing to be unbiased for"),
  "r": ("#FFFFFF", "refused: W cannot make the rows that f needs"),
  "t": ("#BBBBBB", "refused: heavy tails, trigonometric f only"),
  "x": ("#777777", "refused: another reason, named in the error"),
}


def components_page() -> str:
  """The text of docs/components.md."""
  entries = _entries(COMPONENTS, "family", FAMILIES)
  columns = {
    "name": lambda info: f"`{info.name}`",
    "estimates": lambda info: info.estimates,
    "feature of one row": lambda info: _code(info.formula),
    "positive": lambda info: "yes" if info.positive else "no",
    "F": lambda info: info.features,
    "rows": lambda info: info.row_law,
    "causal": lambda info: "yes" if info.causal_safe else "no",
    "relative variance of one row": lambda info: _code(info.variance),
    "cost beside W x": lambda info: info.cost,
    "use it for": lambda info: info.good_for,
    "do not use it for": lambda info: info.avoid,
    "source": lambda info: info.source,
  }
  return _page(
    "Component functions",
    "f in phi(x) = f(W x, x): how frequencies become features. Inputs x and y "
    "are queries and keys times `head_dim ** -1/4`; H is head_dim, M the "
    "number of rows of W, F the number of features, K the kernel. Options and "
    "formulas in full: the docstring of each class.",
    _sections([component.info for component in entries], "family", columns),
  )


def weight_matrices_page() -> str:
  """The text of docs/weight_matrices.md."""
  entries = _entries(WEIGHT_MATRICES, "group", GROUPS)
  columns = {
    "name": lambda info: f"`{info.name}`",
    "what it is": lambda info: info.summary,
    "marginals": lambda info: info.marginals,
    "row laws": lambda info: ", ".join(info.row_laws),
    "row weights": lambda info: (
      "signed" if info.signed else "positive" if info.weighted else "-"
    ),
    "learnt": lambda info: "yes" if info.learnable else "no",
    "redraw": lambda info: "yes" if info.redrawable else "no",
    "constraint": lambda info: info.constraint,
    "cost of a draw": lambda info: info.cost,
    "variance against iid": lambda info: info.variance,
    "good for": lambda info: info.good_for,
    "source": lambda info: info.source,
  }
  return _page(
    "Weight matrices",
    "W in phi(x) = f(W x, x): which frequencies a map uses. Marginals are "
    "*exact* (each row alone has the law that f asks for: unbiased), "
    "*weighted* (unbiased with its row weights) or *approximate* (first two "
    "moments only: biased; the bias of mm, mm_anti and ssr_pos falls like "
    "1/M, that of the others does not fall with M). M is num_features, H is "
    "head_dim. The picture of all pairs: ![pairs](pairs.png)",
    _sections([matrix.info for matrix in entries], "group", columns),
  )


def pair_statuses() -> dict[str, dict[str, str]]:
  """Component -> weight matrix -> letter of `STATUSES`, in order of display."""
  components = _entries(COMPONENTS, "family", FAMILIES)
  matrices = _entries(WEIGHT_MATRICES, "group", GROUPS)
  return {
    f.info.name: {w.info.name: _status(f, w) for w in matrices}
    for f in components
  }


def fingerprint(statuses: dict[str, dict[str, str]]) -> str:
  """Digest that the picture carries, to see whether it is up to date."""
  text = json.dumps([statuses, STATUSES])
  return hashlib.sha256(text.encode()).hexdigest()


def picture_fingerprint(path: pathlib.Path) -> str:
  """The digest stored in a picture; "" if there is none."""
  from PIL import Image

  with Image.open(path) as image:
    return image.text.get("Comment", "")


def draw_pairs(path: pathlib.Path) -> None:
  """Draws the matrix of what works."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.patches
  from matplotlib import pyplot

  statuses = pair_statuses()
  rows = list(statuses)
  columns = list(statuses[rows[0]])
  cell = 0.27
  figure, axes = pyplot.subplots(
    figsize=(cell * len(columns) + 3.0, cell * len(rows) + 3.4),
    layout="constrained",
  )
  for i, row in enumerate(rows):
    for j, column in enumerate(columns):
      letter = statuses[row][column]
      axes.add_patch(
        matplotlib.patches.Rectangle(
          (j, i),
          1,
          1,
          facecolor=STATUSES[letter][0],
          edgecolor="#999999",
          lw=0.4,
        )
      )
      axes.text(j + 0.5, i + 0.5, letter, ha="center", va="center", fontsize=7)
  axes.set_xlim(0, len(columns))
  axes.set_ylim(len(rows), 0)
  axes.set_xticks([j + 0.5 for j in range(len(columns))], columns, rotation=90)
  axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
  axes.tick_params(length=0, labelsize=8, labelfontfamily="monospace")
  _mark_groups(axes, rows, columns)
  used = {letter for row in statuses.values() for letter in row.values()}
  figure.legend(
    handles=[
      matplotlib.patches.Patch(
        facecolor=colour, edgecolor="#999999", label=f"{letter}   {meaning}"
      )
      for letter, (colour, meaning) in STATUSES.items()
      if letter in used
    ],
    loc="outside lower center",
    ncols=2,
    fontsize=8,
    frameon=False,
  )
  working = len(sf.list_feature_maps())
  figure.suptitle(
    f"{len(rows)} component functions x {len(columns)} weight matrices: "
    f"{working} maps",
    fontsize=11,
  )
  figure.savefig(
    path, dpi=130, metadata={"Comment": fingerprint(statuses), "Software": None}
  )
  pyplot.close(figure)


def main() -> None:
  """Writes all three files."""
  (FOLDER / "components.md").write_text(components_page())
  (FOLDER / "weight_matrices.md").write_text(weight_matrices_page())
  draw_pairs(FOLDER / "pairs.png")


def _entries(registry, field: str, order: Sequence[str]) -> list:
  """Default objects of all names, by place in the taxonomy, then by name."""
  entries = [registry.build(name) for name in registry.names()]
  return sorted(
    entries,
    key=lambda entry: (
      order.index(getattr(entry.info, field)),
      entry.info.name,
    ),
  )


def _status(component, matrix) -> str:
  """The letter of a pair."""
  if mismatch(component, matrix) is not None:
    if component.info.row_law not in matrix.info.row_laws:
      return "r"
    return "t" if matrix.info.trig_only else "x"
  if component.info.learnable:
    return "K"
  if matrix.info.learnable:
    return "L"
  return matrix.info.marginals[0].upper()


def _mark_groups(axes, rows, columns) -> None:
  """Lines between the places of the taxonomy, their names outside."""
  families = [COMPONENTS.build(name).info.family for name in rows]
  groups = [WEIGHT_MATRICES.build(name).info.group for name in columns]
  for start, stop, name in _runs(groups):
    axes.axvline(stop, color="black", lw=1.2)
    axes.text(
      (start + stop) / 2,
      -0.25,
      name,
      ha="center",
      va="bottom",
      fontsize=8,
      rotation=0 if stop - start > 3 else 35,
    )
  for start, stop, name in _runs(families):
    axes.axhline(stop, color="black", lw=1.2)
    axes.text(
      len(columns) + 0.25, (start + stop) / 2, name, va="center", fontsize=8
    )


def _runs(names: Sequence[str]) -> Iterable[tuple[int, int, str]]:
  """Runs of equal names: (start, stop, name)."""
  start = 0
  for i in range(1, len(names) + 1):
    if i == len(names) or names[i] != names[start]:
      yield start, i, names[start]
      start = i


def _page(title: str, intro: str, sections: str) -> str:
  """A page that says how it was made."""
  return (
    f"# {title}\n\n{intro}\n\n"
    f"Made from the registry by `{COMMAND}`; do not edit.\n\n{sections}"
  )


def _sections(infos, field: str, columns) -> str:
  """One table for each place in the taxonomy."""
  parts = []
  for start, stop, name in _runs([getattr(info, field) for info in infos]):
    lines = [
      f"## {_heading(name)}\n",
      _line(columns),
      _line("---" for _ in columns),
      *(
        _line(show(info) or "-" for show in columns.values())
        for info in infos[start:stop]
      ),
    ]
    parts.append("\n".join(lines) + "\n")
  return "\n".join(parts)


def _heading(name: str) -> str:
  """A place in the taxonomy as a title."""
  return name.capitalize().replace("carlo", "Carlo")


def _line(cells: Iterable[str]) -> str:
  """One line of a Markdown table."""
  escaped = (cell.replace("|", "\\|") for cell in cells)
  return "| " + " | ".join(escaped) + " |"


def _code(text: str) -> str:
  """A formula as code."""
  return f"`{text}`" if text else ""


if __name__ == "__main__":
  main()
