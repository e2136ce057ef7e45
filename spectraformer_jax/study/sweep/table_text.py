"""How the figures of a table are written."""

import csv
import io
from collections.abc import Sequence

from spectraformer_jax.study.sweep.runs import Spread, paper_figures

NONE = "-"
PAPER = "†"


def to_csv(rows: Sequence[dict]) -> str:
  """Rows with equal keys; None is empty."""
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def accuracy_text(spread: Spread | None) -> str:
  """``38.05 (0.78)``."""
  if spread is None:
    return NONE
  sd = NONE if spread.sd is None else f"{spread.sd:.2f}"
  return f"{spread.mean:.2f} ({sd})"


def p_text(p: float) -> str:
  """Three decimals, and no zero.

  Example:
    >>> p_text(0.0123), p_text(1e-7)
    ('0.012', '< 0.001')
  """
  return "< 0.001" if p < 0.001 else f"{p:.3f}"


def mean_text(spread: Spread | None) -> str:
  """The mean alone."""
  return NONE if spread is None else f"{spread.mean:.2f}"


def paper_text(attention: str, task: str) -> str:
  """The authors' accuracy, or nothing."""
  figures = paper_figures().get((attention, task))
  if figures is None:
    return NONE
  return f"{figures['accuracy']:.2f} ({figures['accuracy_sd']:.2f})"


def markdown_table(
  headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:
  """Lines; figures to the right."""
  line = lambda cells: f"| {' | '.join(cells)} |"
  rule = f"|---|{'---:|' * (len(headings) - 1)}"
  return [line(headings), rule, *map(line, rows)]


def escape_latex(text: str) -> str:
  r"""Text for LaTeX.

  Example:
    >>> print(escape_latex("oprf-fastfood_learnable 5 %"))
    oprf-fastfood\_learnable 5 \%
  """
  text = text.replace("%", r"\%").replace("_", r"\_").replace("−", "$-$")
  return text.replace(PAPER, r"$^\dagger$")
