"""Makes the records of a sweep's table, one for each attention and task."""

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from spectraformer_jax.study.sweep.runs import (
  Difference,
  Published,
  Run,
  differences,
  group,
  labels,
  paper_figures,
)


class Entry(NamedTuple):
  """An attention on one task.

  Attributes:
    task, attention: labels.
    seeds: number of runs.
    accuracy: mean test accuracy over seeds, in per cent.
    accuracy_sd: sample standard deviation of the accuracy; None for one seed.
    seconds: mean time of training.
    peak_bytes: mean peak memory.
    parameters: of the model.
    provenance: of the data.
    difference: from the reference; None for the reference, and on tasks that
      the reference lacks.
    published: the authors' figures; None if they give none.
  """

  task: str
  attention: str
  seeds: int
  accuracy: float
  accuracy_sd: float | None
  seconds: float
  peak_bytes: float
  parameters: int
  provenance: str
  difference: Difference | None
  published: Published | None


class Comparison(NamedTuple):
  """The figures of a sweep.

  Attributes:
    runs: the finished runs.
    tasks, attentions: labels in the order of the table.
    against: label of the reference, which the others are compared with.
    entries: (attention, task) -> entry, if any run of them has finished; in the
      order of the table, task by task.
  """

  runs: Sequence[Run]
  tasks: list[str]
  attentions: list[str]
  against: str
  entries: dict[tuple[str, str], Entry]


def compare(runs: Sequence[Run], against: str | None = None) -> Comparison:
  """Makes the records of a sweep's table.

  Args:
    runs: finished runs.
    against: label of the reference; None: softmax if the sweep has it, else the
      best attention.

  Raises:
    ValueError: `against` is not among the attentions.
  """
  tasks, attentions = labels(runs)
  against = against or ("softmax" if "softmax" in attentions else attentions[0])
  if against not in attentions:
    raise ValueError(
      f"--against={against!r} is not among {', '.join(attentions)}."
    )
  tested, groups, entries = differences(runs, against), group(runs), {}
  for task, attention in itertools.product(tasks, attentions):
    if (attention, task) not in groups:
      continue
    seeds = groups[attention, task]
    accuracies = [run.accuracy for run in seeds]
    entries[attention, task] = Entry(
      task,
      attention,
      len(seeds),
      statistics.fmean(accuracies),
      statistics.stdev(accuracies) if len(seeds) > 1 else None,
      statistics.fmean(run.seconds for run in seeds),
      statistics.fmean(run.peak_bytes for run in seeds),
      seeds[0].result["parameters"],
      seeds[0].result["provenance"],
      tested.get((attention, task)),
      paper_figures().get((attention, task)),
    )
  return Comparison(runs, tasks, attentions, against, entries)
