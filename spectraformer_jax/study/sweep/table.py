"""The paper's table of a sweep, as Markdown, CSV and LaTeX.

  python -m spectraformer_jax.study table runs/s --out=docs/results/s

Several folders are read as one sweep (the shards of several machines).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spectraformer_jax.study.sweep import runs as cell_runs
from spectraformer_jax.study.sweep.runs import Run, Spread
from spectraformer_jax.study.sweep.table_text import (
  NONE,
  PAPER,
  accuracy_text,
  escape_latex,
  markdown_table,
  mean_text,
  p_text,
  paper_text,
  to_csv,
)
from spectraformer_jax.train.run.run_folder import write_text

# In CSV: the task of the rows of means, and what they are of.
MEAN = "mean over tasks"
AVERAGED = ("accuracy", "seconds", "peak_bytes")
AVERAGED += ("paper_accuracy", "paper_hours", "paper_gigabytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""
  parser.add_argument("folder", nargs="+", help="of the sweep")
  parser.add_argument("--out", required=True, help="folder of the tables")
  parser.add_argument(
    "--against",
    help="attention to compare with; default softmax, or else the best",
  )
  parser.add_argument("--command", help="how it was run, for the table's foot")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
  runs, unfinished = cell_runs.read_runs(args.folder)
  table = Table(runs, against=args.against)
  out = Path(args.out)
  markdown = table.markdown(unfinished=unfinished, command=args.command)
  write_text(out / "table.md", markdown)
  write_text(out / "table.tex", table.latex())
  write_text(out / "table.csv", table.csv())
  write_text(out / "cells.csv", cells_csv(runs))
  print(markdown)
  return 0


class Table:
  """The figures of a sweep in the paper's form.

  Args:
    runs: finished cells.
    against: label of the attention that others are compared with.

  Raises:
    ValueError: `against` is not among them.
  """

  def __init__(self, runs: Sequence[Run], *, against: str | None = None):
    self._runs = runs
    self._grouped = cell_runs.group(runs)
    self.tasks, self.attentions = cell_runs.labels(runs)
    default = "softmax" if "softmax" in self.attentions else self.attentions[0]
    self.against = against or default
    if self.against not in self.attentions:
      raise ValueError(
        f"--against={against!r} is not among {', '.join(self.attentions)}."
      )
    self._differences = cell_runs.differences(runs, self.against)
    longest = max(run.seconds for run in runs)
    self._unit, self._seconds = ("h", 3600) if longest > 3600 else ("min", 60)
    # The paper's columns beside ours for its own tasks and attentions.
    paper = cell_runs.paper_figures()
    self._beside = [
      task
      for task in self.tasks
      if any((name, task) in paper for name in self.attentions)
    ]

  def spread(
    self, task: str, attention: str, of: Callable[[Run], float]
  ) -> Spread | None:
    """A figure over the seeds of a cell."""
    runs = self._grouped.get((task, attention))
    return Spread(tuple(map(of, runs))) if runs else None

  def _columns(self):
    """Heading and ``attention -> text`` of each column."""
    accuracy = lambda run: run.accuracy
    time = lambda run: run.seconds / self._seconds
    memory = lambda run: run.peak_bytes / 1e9

    def mean_of(of):
      """Over tasks, for an attention that has them all."""

      def text(attention):
        spreads = [self.spread(task, attention, of) for task in self.tasks]
        if None in spreads:
          return NONE
        return f"{statistics.fmean(s.mean for s in spreads):.2f}"

      return text

    yield "attention", lambda attention: attention
    yield "parameters", self._parameters
    for task in self.tasks:
      yield (
        f"{task} %",
        lambda name, task=task: (
          accuracy_text(self.spread(task, name, accuracy))
          + self._mark(task, name)
        ),
      )
      if task in self._beside:
        yield f"{task} %{PAPER}", lambda name, task=task: paper_text(name, task)
    yield "mean %", mean_of(accuracy)
    yield from self._paper_means("accuracy", "%")
    for heading, of in ((self._unit, time), ("GB", memory)):
      for task in self.tasks:
        yield (
          f"{task} {heading}",
          lambda name, task=task, of=of: mean_text(self.spread(task, name, of)),
        )
      yield f"mean {heading}", mean_of(of)
      theirs = {"GB": "gigabytes", "h": "hours"}.get(heading)
      yield from self._paper_means(theirs, heading)

  def _paper_means(self, figure: str | None, heading: str):
    """The authors' means over tasks, if the tasks are theirs, all of them."""
    paper = cell_runs.paper_figures()
    if figure is None or {task for _, task in paper} != set(self.tasks):
      return

    def text(attention):
      found = [paper.get((attention, task)) for task in self.tasks]
      if None in found:
        return NONE
      return f"{statistics.fmean(f[figure] for f in found):.2f}"

    yield f"mean {heading}{PAPER}", text

  def _parameters(self, attention: str) -> str:
    """Those of the first task that it has."""
    task = next(t for t in self.tasks if (t, attention) in self._grouped)
    return f"{self._grouped[task, attention][0].result['parameters']:,}"

  def _mark(self, task: str, attention: str) -> str:
    """Whether it differs from the reference."""
    difference = self._differences.get((task, attention))
    verdict = difference.verdict if difference else ""
    return {cell_runs.BETTER: " +", cell_runs.WORSE: " −"}.get(verdict, "")

  def cells(self) -> tuple[list[str], list[list[str]]]:
    """Headings and rows."""
    columns = list(self._columns())
    return [heading for heading, _ in columns], [
      [text(attention) for _, text in columns] for attention in self.attentions
    ]

  def markdown(
    self, *, unfinished: Sequence[str] = (), command: str | None = None
  ) -> str:
    """The whole document: table, differences, what it does and does not show.

    Args:
      unfinished: names of cells that are not in it.
      command: how the sweep was run.
    """
    headings, rows = self.cells()
    lines = ["# Results", "", *markdown_table(headings, rows), ""]
    lines += [*self._notes(), "", *self._difference_lines(), ""]
    if unfinished:
      lines += [f"Not finished: {', '.join(unfinished)}.", ""]
    lines += ["## Provenance", "", *self._provenance(command), ""]
    return "\n".join(lines)

  def _notes(self) -> list[str]:
    """What the columns are."""
    seeds = sorted({len(runs) for runs in self._grouped.values()})
    device = all(r.result["peak_device_bytes"] is not None for r in self._runs)
    errors = [
      f"{task} {max(map(cell_runs.test_set_error, self._of_task(task))):.1f}"
      for task in self.tasks
    ]
    lines = [
      f"Test accuracy of the best-dev parameters: mean (standard deviation) "
      f"over {' to '.join(map(str, seeds[:: len(seeds) - 1 or 1]))} seed(s). "
      f"Time: training on the devices below, without compilation and "
      f"evaluation. Memory: peak of the {'device' if device else 'process'}. "
      "Parameters: those of the first task.",
      f"`+` and `−`: better or worse than {self.against} (below). No mark: the "
      "difference is not significant, or there are too few seeds to tell.",
      "A mean over tasks is given where an attention has all of them. Standard "
      "error from the size of the test set, in points, which seeds do not "
      f"show: {', '.join(errors)}.",
    ]
    if self._beside:
      lines.append(
        f"{PAPER} The authors' own figures (README of the official release, "
        "October 2025, full-length tasks), **not measured "
        "here**. Settings, data and code differ from ours unless stated "
        "(differences.md), so a gap is not one of the attention alone."
      )
    return [line for text in lines for line in (text, "")][:-1]

  def _of_task(self, task: str) -> list[Run]:
    return [run for run in self._runs if run.task == task]

  def _difference_lines(self) -> list[str]:
    """The comparisons in full."""
    rows = []
    for task in self.tasks:
      for attention in self.attentions:
        found = self._differences.get((task, attention))
        if found is None:
          continue
        interval = (
          "" if found.half_width is None else f" ± {found.half_width:.2f}"
        )
        p = NONE if found.p is None else p_text(found.p)
        verdict = {cell_runs.UNKNOWN: "too few seeds to tell"}
        rows.append(
          [
            task,
            attention,
            f"{found.points:+.2f}{interval}",
            p,
            verdict.get(found.verdict, found.verdict),
          ]
        )
    headings = ["task", "attention", "points (95 %)", "p", ""]
    return [
      f"## Differences from {self.against}",
      "",
      "Welch's t-test over seeds, two-sided; p after Holm's correction over "
      f"the attentions of a task, level {cell_runs.LEVEL}.",
      "",
      *markdown_table(headings, rows),
    ]

  def _provenance(self, command: str | None) -> list[str]:
    """Data, settings and machines."""
    rows = []
    for task in self.tasks:
      runs = self._of_task(task)
      data, train = runs[0].data, runs[0].config["train"]
      baselines = runs[0].result["baselines"].items()
      rows.append(
        [
          task,
          f"{data['test']['name']}: {runs[0].result['provenance']}",
          " / ".join(f"{part['num_examples']:,}" for part in data.values()),
          f"{train['num_steps']:,} x {train['batch_size']}",
          ", ".join(f"{name} {100 * x:.1f} %" for name, x in baselines),
        ]
      )
    headings = ["task", "data", "train / dev / test", "steps", "baselines"]
    lines = markdown_table(headings, rows)
    for name in ("git_revision", "jax", "platform", "cpus"):
      found = {str(run.environment.get(name)) for run in self._runs}
      lines.append(f"{name}: {', '.join(sorted(found))}  ")
    devices = {
      f"{len(d)} x {d[0]}"
      for d in (r.environment["devices"] for r in self._runs)
    }
    lines.insert(len(rows) + 2, "")
    lines.append(f"devices: {', '.join(sorted(devices))}  ")
    if command:
      lines += ["", "```", command, "```"]
    return lines

  def latex(self) -> str:
    """The table, for the package booktabs."""
    headings, rows = self.cells()
    line = lambda cells: " & ".join(map(escape_latex, cells)) + r" \\"
    notes = [*self._notes(), "", *self._provenance(None)]
    return "\n".join(
      [
        *(f"% {text.strip().replace('**', '')}" for text in notes if text),
        rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        r"\toprule",
        line(headings),
        r"\midrule",
        *map(line, rows),
        r"\bottomrule",
        r"\end{tabular}",
        "",
      ]
    )

  def csv(self) -> str:
    """One row for each task and attention, figures in full; then the means."""
    paper = cell_runs.paper_figures()
    rows: list[dict[str, Any]] = []
    for task in self.tasks:
      for attention in self.attentions:
        runs = self._grouped.get((task, attention))
        if not runs:
          continue
        theirs = paper.get((attention, task), {})
        difference = self._differences.get((task, attention))
        accuracy = Spread(tuple(run.accuracy for run in runs))
        rows.append(
          {
            "task": task,
            "attention": attention,
            "seeds": len(runs),
            "accuracy": accuracy.mean,
            "accuracy_sd": accuracy.sd,
            "seconds": statistics.fmean(run.seconds for run in runs),
            "peak_bytes": statistics.fmean(run.peak_bytes for run in runs),
            "parameters": runs[0].result["parameters"],
            "provenance": runs[0].result["provenance"],
            "against": self.against,
            "points": difference and difference.points,
            "p": difference and difference.p,
            "verdict": difference and difference.verdict,
            "paper_accuracy": theirs.get("accuracy"),
            "paper_accuracy_sd": theirs.get("accuracy_sd"),
            "paper_hours": theirs.get("hours"),
            "paper_gigabytes": theirs.get("gigabytes"),
          }
        )
    return to_csv([*rows, *self._mean_rows(rows)])

  def _mean_rows(self, rows):
    """Over tasks, for each attention that has them all, if there are some."""
    for attention in self.attentions:
      found = [row for row in rows if row["attention"] == attention]
      if len(self.tasks) == 1 or len(found) < len(self.tasks):
        continue
      means = {"task": MEAN, "attention": attention}
      for name in AVERAGED:
        values = [row[name] for row in found]
        means[name] = None if None in values else statistics.fmean(values)
      yield dict.fromkeys(found[0]) | means


def cells_csv(runs: Sequence[Run]) -> str:
  """One row for each run."""
  names = ["test/accuracy", "test/accuracy_last", "dev/accuracy_best"]
  names += ["best_step", "train_seconds", "compile_seconds", "step_seconds"]
  names += ["peak_memory_bytes", "peak_device_bytes", "parameters"]
  return to_csv(
    [
      {
        "task": run.task,
        "attention": run.attention,
        "seed": run.seed,
        **{name: run.result[name] for name in names},
        "provenance": run.result["provenance"],
        "git_revision": run.environment["git_revision"],
      }
      for run in runs
    ]
  )
