"""The report of measured errors: tables, advice, pictures."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from spectraformer_jax.study.approximation.advice import advise, half_width
from spectraformer_jax.study.approximation.settings import Setting, over_uniform

UNIFORM = "uniform attention"
# Columns that a narrow terminal has no room for.
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


def lines(setting: Setting) -> tuple[list[str], list[list[str]]]:
  """Header and cells of the table of a setting, least error first."""
  sizes = setting.sizes
  header = ["", "pair", *(f"M={size}" for size in sizes), "±", "/ uniform"]
  header += ["slope", "kernel MSE", "ms", "MiB"]
  exact = setting.rows[0]
  blank = [""] * len(sizes)
  table = [
    ["", "exact attention", *blank, "", "", "", ""]
    + [_figure(exact["exact_ms"]), _figure(exact["exact_temp_mib"])]
  ]
  trivial = ["", UNIFORM, *([_figure(setting.uniform_error)] * len(sizes))]
  trivial += ["", "1", "", "", "", ""]
  place = 0
  for place, row in enumerate(setting.ranking(), 1):
    if trivial and not row["error"] < setting.uniform_error:
      table.append(trivial)
      trivial = None
    by_size = {r.num_features: r["error"] for r in setting.of_pair(row.pair)}
    without_size = by_size.get(None)
    table.append(
      [str(place), row.pair]
      + [_figure(by_size.get(size, without_size)) for size in sizes]
      + [_figure(half_width(row), 1)]
      + [_figure(over_uniform(row), 2)]
      + [_slope(setting.slope(row.pair)), _figure(row["kernel_mse_median"])]
      + [_figure(row["ms"]), _figure(row["temp_mib"])]
    )
  if trivial:
    table.append(trivial)
  return header, table


def print_setting(setting: Setting, console: Console) -> None:
  """Prints the table and the advice."""
  header, rows = lines(setting)
  if console.width < WIDE:
    keep = [i for i, name in enumerate(header) if name not in IN_REPORT_ONLY]
    header, *rows = ([cells[i] for i in keep] for cells in (header, *rows))
  table = Table(title=setting.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  for name in header:
    left = name == "pair"
    table.add_column(name, justify="left" if left else "right", no_wrap=True)
  below = False
  for row in rows:
    below = below or row[1] == UNIFORM
    table.add_row(*row, style="dim" if below else "")
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
    settings: all that was measured.
    pictures: files in the same folder.
    command: what was typed.
    skipped: what was left out, and why.
  """
  # Here, because it brings in all of training for the versions it lists.
  from spectraformer_jax.train.run.run_folder import environment, write_text

  env = environment(command)
  devices = env["devices"]
  text = ["# Approximation of attention", "", "```", command, "```", ""]
  text += [
    f"spectraformer_jax {env['spectraformer_jax']}, revision "
    f"{env['git_revision'] or 'unknown'}, jax {env['jax']}, {env['platform']}, "
    f"{len(devices)} x {devices[0]}, {settings[0].rows[0].key['draws']} draws.",
    "",
    NOTES,
  ]
  if skipped:
    text += ["Left out:", "", *(f"- {line}" for line in skipped), ""]
  for setting in settings:
    text += [f"## {setting.title}", "", advise(setting), ""]
    text += [*markdown(*lines(setting)), ""]
  for picture in pictures:
    text += [f"![{picture.stem.replace('_', ' ')}]({picture.name})", ""]
  write_text(path, "\n".join(text))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a Markdown table; the second column is text, others figures.

  Example:
    >>> markdown(["", "pair"], [["1", "oprf-orf"]])
    ['|  | pair |', '|--:|---|', '| 1 | oprf-orf |']
  """
  rule = "|" + "|".join("---" if i == 1 else "--:" for i in range(len(header)))
  lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
  return [lines[0], f"{rule}|", *lines[1:]]


def _figure(value: float | None, digits: int = 3) -> str:
  return "-" if value is None else f"{value:.{digits}g}"


def _slope(fit) -> str:
  if fit is None:
    return "-"
  error = fit.standard_error
  return f"{fit.slope:.2f}" + (f" ± {error:.2f}" if error is not None else "")
