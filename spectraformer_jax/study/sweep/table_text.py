"""Formats the records of a sweep's table as Markdown, LaTeX and CSV."""

import csv
import io
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from spectraformer_jax.study import SIGNIFICANCE
from spectraformer_jax.study.sweep.comparison import Comparison, Entry
from spectraformer_jax.study.sweep.runs import (
  Published,
  Run,
  paper_figures,
  time_unit,
)

NONE = "-"
# Marks columns of the authors' own figures.
PAPER = "†"
MARKS = {"better": " +", "worse": " −"}
# Stands for the task in those rows of table.csv that hold means over tasks.
MEAN = "mean over tasks"


def columns(comparison: Comparison) -> dict[str, list[str]]:
  """Returns the table's columns: heading -> one text for each attention."""
  tasks, names = comparison.tasks, comparison.attentions
  ours, paper = comparison.entries, paper_figures()

  def column(
    source: Mapping[tuple[str, str], Any],
    tasks: list[str],
    text: Callable[[list[Any]], str],
  ) -> list[str]:
    rows = [[source.get((name, task)) for task in tasks] for name in names]
    return [NONE if None in row else text(row) for row in rows]

  def mean(figure: str, unit: float = 1.0) -> Callable[[list[Any]], str]:
    return lambda row: (
      f"{statistics.fmean(getattr(entry, figure) / unit for entry in row):.2f}"
    )

  result = {"attention": names, "parameters": []}
  for name in names:
    first = next(ours[name, task] for task in tasks if (name, task) in ours)
    result["parameters"].append(f"{first.parameters:,}")
  is_the_papers = {task for _, task in paper} == set(tasks)
  symbol, seconds = time_unit(comparison.runs)
  for heading, figure, unit, theirs in (
    ("%", "accuracy", 1.0, "accuracy"),
    (symbol, "seconds", seconds, "hours" if symbol == "h" else None),
    ("GB", "peak_bytes", 1e9, "gigabytes"),
  ):
    for task in tasks:
      text = _accuracy if heading == "%" else mean(figure, unit)
      result[f"{task} {heading}"] = column(ours, [task], text)
      if heading == "%" and any((name, task) in paper for name in names):
        result[f"{task} %{PAPER}"] = column(paper, [task], text)
    result[f"mean {heading}"] = column(ours, tasks, mean(figure, unit))
    if is_the_papers and theirs:
      result[f"mean {heading}{PAPER}"] = column(paper, tasks, mean(theirs))
  return result


def _accuracy(row: list[Entry | Published]) -> str:
  """Formats ``38.05 (0.78) +``: a mark if it differs from the reference."""
  (entry,) = row
  sd = NONE if entry.accuracy_sd is None else f"{entry.accuracy_sd:.2f}"
  difference = entry.difference if isinstance(entry, Entry) else None
  mark = MARKS.get(difference.verdict, "") if difference else ""
  return f"{entry.accuracy:.2f} ({sd}){mark}"


def markdown(
  comparison: Comparison, unfinished: Sequence[str], command: str | None
) -> str:
  """Formats the whole document.

  Args:
    comparison: the figures.
    unfinished: names of cells that are not in the comparison.
    command: how the sweep was run.
  """
  table = columns(comparison)
  lines = ["# Results", ""]
  lines += [*markdown_table(table, zip(*table.values(), strict=True)), ""]
  for note in _notes(comparison):
    lines += [note, ""]
  lines += [*_differences(comparison), ""]
  if unfinished:
    lines += [f"Not finished: {', '.join(unfinished)}.", ""]
  lines += ["## Provenance", "", *_provenance(comparison), ""]
  if command:
    lines[-1:] = ["", "```", command, "```", ""]
  return "\n".join(lines)


def _notes(comparison: Comparison) -> list[str]:
  """Explains the columns, a paragraph each."""
  runs, tasks = comparison.runs, comparison.tasks
  seeds = sorted({entry.seeds for entry in comparison.entries.values()})
  of_device = all(r.result["peak_device_bytes"] is not None for r in runs)
  errors = [
    f"{task} {max(run.sampling_error for run in runs if run.task == task):.1f}"
    for task in tasks
  ]
  notes = [
    "Test accuracy of the best-dev parameters: mean (standard deviation) over "
    f"{' to '.join(map(str, seeds[:: len(seeds) - 1 or 1]))} seed(s). Time: "
    "training on the devices below, without compilation and evaluation. "
    f"Memory: peak of the {'device' if of_device else 'process'}. Parameters: "
    "those of the first task.",
    f"`+` and `−`: better or worse than {comparison.against} (below). No mark: "
    "the difference is not significant, or there are too few seeds to tell.",
    "A mean over tasks is given where an attention has all of them. Standard "
    "error from the size of the test set, in points, which seeds do not "
    f"show: {', '.join(errors)}.",
  ]
  labels = {(n, t) for n in comparison.attentions for t in tasks}
  if labels & paper_figures().keys():
    notes.append(
      f"{PAPER} The authors' own figures (README of the official release, "
      "October 2025, full-length tasks), **not measured "
      "here**. Settings, data and code differ from ours unless stated "
      "(differences.md), so a gap is not one of the attention alone."
    )
  return notes


def _differences(comparison: Comparison) -> list[str]:
  """Lines of the section on differences from the reference."""
  rows = []
  for entry in comparison.entries.values():
    if not (difference := entry.difference):
      continue
    points, half_width, p, verdict = difference
    interval = "" if half_width is None else f" ± {half_width:.2f}"
    rows.append(
      [
        entry.task,
        entry.attention,
        f"{points:+.2f}{interval}",
        NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "too few seeds to tell" if p is None else verdict,
      ]
    )
  return [
    f"## Differences from {comparison.against}",
    "",
    "Welch's t-test over seeds, two-sided; p after Holm's correction over "
    f"the attentions of a task, level {SIGNIFICANCE}.",
    "",
    *markdown_table(["task", "attention", "points (95 %)", "p", ""], rows),
  ]


def _provenance(comparison: Comparison) -> list[str]:
  """Lines about data, settings and machines."""
  rows = []
  for task in comparison.tasks:
    run = next(run for run in comparison.runs if run.task == task)
    train, result = run.config["train"], run.result
    rows.append(
      [
        task,
        f"{run.data['test']['name']}: {result['provenance']}",
        " / ".join(f"{part['num_examples']:,}" for part in run.data.values()),
        f"{train['num_steps']:,} x {train['batch_size']}",
        ", ".join(
          f"{n} {100 * x:.1f} %" for n, x in result["baselines"].items()
        ),
      ]
    )
  headings = ["task", "data", "train / dev / test", "steps", "baselines"]
  lines = [*markdown_table(headings, rows), ""]
  environments = [run.environment for run in comparison.runs]
  for name in ("git_revision", "jax", "platform", "cpus"):
    values = {str(environment.get(name)) for environment in environments}
    lines.append(f"{name}: {', '.join(sorted(values))}  ")
  devices = {f"{len(e['devices'])} x {e['devices'][0]}" for e in environments}
  return [*lines, f"devices: {', '.join(sorted(devices))}  "]


def markdown_table(
  headings: Collection[str], rows: Iterable[Collection[str]]
) -> list[str]:
  """Lines of a table with text in its first column, figures in the others."""
  line = lambda cells: f"| {' | '.join(cells)} |"
  rule = f"|---|{'---:|' * (len(headings) - 1)}"
  return [line(headings), rule, *map(line, rows)]


def latex(comparison: Comparison) -> str:
  """Formats the table for the package booktabs, notes as comments."""
  table = columns(comparison)
  line = lambda cells: " & ".join(map(_escape_latex, cells)) + r" \\"
  notes = [*_notes(comparison), *_provenance(comparison)]
  return "\n".join(
    [
      *(f"% {text.strip().replace('**', '')}" for text in notes if text),
      rf"\begin{{tabular}}{{l{'r' * (len(table) - 1)}}}",
      r"\toprule",
      line(table),
      r"\midrule",
      *map(line, zip(*table.values(), strict=True)),
      r"\bottomrule",
      r"\end{tabular}",
      "",
    ]
  )


def _escape_latex(text: str) -> str:
  text = text.replace("%", r"\%").replace("_", r"\_").replace("−", "$-$")
  return text.replace(PAPER, r"$^\dagger$")


# Columns of table.csv of which means over tasks are given.
_AVERAGED = ("accuracy", "seconds", "peak_bytes")
_AVERAGED += ("paper_accuracy", "paper_hours", "paper_gigabytes")


def entries_csv(comparison: Comparison) -> str:
  """Formats a row for each task and attention, not rounded; then the means."""
  # The last two fields, `difference` and `published`, become several columns.
  own, paper = Entry._fields[:-2], Published._fields
  of_difference = ("points", "p", "verdict")
  rows: list[dict[str, Any]] = [
    {name: getattr(entry, name) for name in own}
    | {"against": comparison.against}
    | {name: getattr(entry.difference, name, None) for name in of_difference}
    | {f"paper_{name}": getattr(entry.published, name, None) for name in paper}
    for entry in comparison.entries.values()
  ]
  means = []
  for attention in comparison.attentions:
    of_all = [row for row in rows if row["attention"] == attention]
    if 1 < len(comparison.tasks) == len(of_all):
      mean = dict.fromkeys(rows[0]) | {"task": MEAN, "attention": attention}
      for name in _AVERAGED:
        values = [row[name] for row in of_all]
        mean[name] = None if None in values else statistics.fmean(values)
      means.append(mean)
  return _to_csv(rows + means)


def runs_csv(runs: Sequence[Run]) -> str:
  """Formats a row for each run."""
  names = ["test/accuracy", "test/accuracy_last", "dev/accuracy_best"]
  names += ["best_step", "train_seconds", "compile_seconds", "step_seconds"]
  names += ["peak_memory_bytes", "peak_device_bytes", "parameters"]
  names += ["provenance"]
  return _to_csv(
    [
      {"task": run.task, "attention": run.attention, "seed": run.seed}
      | {name: run.result[name] for name in names}
      | {"git_revision": run.environment["git_revision"]}
      for run in runs
    ]
  )


def _to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
  """Formats rows that have the same keys; None becomes an empty cell."""
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()
