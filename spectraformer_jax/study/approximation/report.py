"""The report of measured errors: tables, advice, pictures."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from spectraformer_jax.study.approximation.advice import advise, half_width
from spectraformer_jax.study.approximation.settings import Setting, over_uniform
from spectraformer_jax.train.run.run_folder import environment, write_text

UNIFORM = "uniform attention"
# Columns that a terminal narrower than WIDE letters has no room for.
IN_REPORT_ONLY, WIDE = ("slope", "kernel MSE", "MiB"), 110
NOTES = """\
Error: Frobenius norm of the difference from exact attention over that of exact
attention, mean over draws of the weight matrix; ± is half of its 95 %
confidence interval, for the largest M. It says nothing about other inputs. Rows
below "uniform attention" are worse than ignoring queries and keys. Slope: of
log error against log M. Kernel MSE: squared error of the kernel over the
squared kernel, mean over draws, median over pairs of a query and a key. Time:
median of single calls; memory: what the compiled program plans beside its
arguments and results.
"""


def table_rows(setting: Setting) -> list[dict[str, str]]:
  """Returns the lines of a setting's table, least error first.

  Each line maps headings to cells. Exact attention comes first; uniform
  attention stands before the first pair that is not better.
  """
  columns = {size: f"M={size}" for size in setting.sizes}
  headings = ["", "pair", *columns.values(), "±", "/ uniform"]
  headings += ["slope", "kernel MSE", "ms", "MiB"]
  exact = uniform = dict.fromkeys(headings, "")
  figures = setting.rows[0].figures
  exact = exact | {"pair": "exact attention", "ms": _figure(figures.exact_ms)}
  exact["MiB"] = _figure(figures.exact_temp_mib)
  uniform = uniform | {"pair": UNIFORM, "/ uniform": "1"}
  uniform |= dict.fromkeys(columns.values(), _figure(figures.uniform_error))
  table = [exact]
  for place, row in enumerate(setting.ranking(), 1):
    if uniform not in table and not over_uniform(row) < 1.0:
      table.append(uniform)
    rows = setting.of_pair(row.pair)
    # A map without rows has one error, under None; it fills all columns of M.
    errors = {r.key.num_features: r.figures.error for r in rows}
    fit = setting.slope(row.pair)
    slope = "-" if fit is None else f"{fit.slope:.2f}"
    if fit and fit.standard_error is not None:
      slope += f" ± {fit.standard_error:.2f}"
    table.append(
      {"": str(place), "pair": row.pair}
      | {columns[s]: _figure(errors.get(s, errors.get(None))) for s in columns}
      | {"±": _figure(half_width(row), 1)}
      | {"/ uniform": _figure(over_uniform(row), 2), "slope": slope}
      | {"kernel MSE": _figure(row.figures.kernel_mse_median)}
      | {"ms": _figure(row.figures.ms), "MiB": _figure(row.figures.temp_mib)}
    )
  return table if uniform in table else [*table, uniform]


def print_setting(setting: Setting, console: Console) -> None:
  """Prints the table and the advice."""
  rows = table_rows(setting)
  table = Table(title=setting.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  is_narrow = console.width < WIDE
  shown = [n for n in rows[0] if not (is_narrow and n in IN_REPORT_ONLY)]
  for name in shown:
    justify = "left" if name == "pair" else "right"
    table.add_column(name, justify=justify, no_wrap=True)
  style = ""
  for row in rows:
    style = "dim" if row["pair"] == UNIFORM else style
    table.add_row(*(row[name] for name in shown), style=style)
  console.print(table)
  console.print(advise(setting), highlight=False)
  console.print()


def write(
  path: Path,
  settings: Sequence[Setting],
  *,
  pictures: Sequence[Path],
  command: str,
  skipped: Sequence[str],
) -> None:
  """Writes the report.

  Args:
    path: of the Markdown file.
    settings: all settings with their measurements.
    pictures: files in the same folder.
    command: the command line.
    skipped: sizes that were left out, and why.
  """
  env = environment(command)
  devices = env["devices"]
  text = ["# Approximation of attention", "", "```", command, "```", ""]
  text += [
    f"spectraformer_jax {env['spectraformer_jax']}, revision "
    f"{env['git_revision'] or 'unknown'}, jax {env['jax']}, {env['platform']}, "
    f"{len(devices)} x {devices[0]}, {settings[0].rows[0].key.draws} draws.",
    "",
    NOTES,
  ]
  if skipped:
    text += ["Left out:", "", *(f"- {line}" for line in skipped), ""]
  for setting in settings:
    text += [f"## {setting.title}", "", advise(setting), ""]
    text += [*markdown(table_rows(setting)), ""]
  for picture in pictures:
    text += [f"![{picture.stem.replace('_', ' ')}]({picture.name})", ""]
  write_text(path, "\n".join(text))


def markdown(rows: Sequence[dict[str, str]]) -> list[str]:
  """Returns the lines of a Markdown table; its column "pair" is text.

  Example:
    >>> markdown([{"": "1", "pair": "oprf-orf"}])
    ['|  | pair |', '|--:|---|', '| 1 | oprf-orf |']
  """
  rule = "|".join("---" if name == "pair" else "--:" for name in rows[0])
  line = lambda cells: f"| {' | '.join(cells)} |"
  return [line(rows[0]), f"|{rule}|", *(line(row.values()) for row in rows)]


def _figure(value: float | None, digits: int = 3) -> str:
  return "-" if value is None else f"{value:.{digits}g}"
