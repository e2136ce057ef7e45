"""What a sweep's folders hold: figures per cell, means over seeds, tests.

Only ``config.json`` and ``metrics.jsonl`` of each cell are read, so results can
be kept, and tables made again, without checkpoints.
"""

import csv
import dataclasses
import functools
import importlib.resources
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from spectraformer_jax.study.sweep.cells import CELL
from spectraformer_jax.train.run import run_folder
from spectraformer_jax.train.run.writers import read_rows, result_row

LEVEL = 0.05
BETTER, WORSE, EQUAL, UNKNOWN = "better", "worse", "not significant", "-"


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished cell.

  Attributes:
    task, attention, seed: its labels.
    folder: its workdir.
    result: the last row of its metrics.
    config, data, environment: of config.json; the environment is the last one.
  """

  task: str
  attention: str
  seed: int
  folder: Path
  result: Mapping[str, Any]
  config: Mapping[str, Any]
  data: Mapping[str, Any]
  environment: Mapping[str, Any]

  @property
  def accuracy(self) -> float:
    """Test accuracy of the best-dev parameters, in per cent."""
    return 100.0 * self.result["test/accuracy"]

  @property
  def seconds(self) -> float:
    """Spent training, without compilation and evaluation."""
    return self.result["train_seconds"]

  @property
  def peak_bytes(self) -> int:
    """Of the device where it reports that, else of the process."""
    device = self.result["peak_device_bytes"]
    return self.result["peak_memory_bytes"] if device is None else device


@dataclasses.dataclass(frozen=True)
class Spread:
  """Mean and sample standard deviation (None of one value)."""

  values: tuple[float, ...]

  @property
  def mean(self) -> float:
    """The mean."""
    return statistics.fmean(self.values)

  @property
  def sd(self) -> float | None:
    """With n - 1."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Difference:
  """An attention against the reference on one task.

  Attributes:
    points: of test accuracy, positive if it is better than the reference.
    half_width: of the 95 % confidence interval; None where there is none.
    p: of Welch's t-test over seeds, after Holm's correction; None as above.
    verdict: BETTER, WORSE, EQUAL or, with fewer than two seeds, UNKNOWN.
  """

  points: float
  half_width: float | None
  p: float | None
  verdict: str


def read_runs(folders: Iterable[Path | str]) -> tuple[list[Run], list[str]]:
  """All cells below the folders of one sweep.

  Args:
    folders: several if its shards were run on several machines.

  Returns:
    The finished ones and the names of the others, both in order of their names.

  Raises:
    ValueError: no finished cell, or the same one in two folders.
  """
  runs, unfinished = {}, set()
  for folder in map(Path, folders):
    for path in sorted(folder.glob("*/*/seed*")):
      name = str(path.relative_to(folder))
      result, stored = result_row(read_rows(path)), run_folder.read_config(path)
      if result is None or stored is None:
        unfinished |= {name} if (path / CELL).exists() else set()
        continue
      if name in runs:
        raise ValueError(f"{path} and {runs[name].folder} are the same cell.")
      task, attention, seed = path.parts[-3:]
      runs[name] = Run(
        task,
        attention,
        int(seed.removeprefix("seed")),
        path,
        result,
        stored["config"],
        stored["data"],
        stored["environments"][-1],
      )
  if not runs:
    raise ValueError(f"no finished cell in {', '.join(map(str, folders))}.")
  return [runs[name] for name in sorted(runs)], sorted(unfinished - set(runs))


def group(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
  """Runs by (task, attention)."""
  grouped: dict[tuple[str, str], list[Run]] = {}
  for run in runs:
    grouped.setdefault((run.task, run.attention), []).append(run)
  return grouped


def labels(runs: Iterable[Run]) -> tuple[list[str], list[str]]:
  """Tasks (those of the paper in its order first) and attentions, best first.

  Best: by the mean over tasks, those with fewer tasks last.
  """
  grouped = group(runs)
  order = list(dict.fromkeys(task for _, task in paper_figures()))
  tasks = sorted({task for task, _ in grouped})
  tasks.sort(key=lambda t: order.index(t) if t in order else len(order))

  def rank(attention):
    means = [
      Spread(tuple(r.accuracy for r in found)).mean
      for (_, name), found in grouped.items()
      if name == attention
    ]
    return -len(means), -statistics.fmean(means), attention

  return tasks, sorted({name for _, name in grouped}, key=rank)


def differences(
  runs: Iterable[Run], reference: str
) -> dict[tuple[str, str], Difference]:
  """Every attention against one, over seeds, task by task.

  Welch's t-test, two-sided; Holm's correction over the attentions of a task.
  Seeds vary initialisation, projections, dropout and order. What varies with
  the choice of test examples is not in it.

  Args:
    runs: finished cells.
    reference: label of an attention.
  """
  grouped = group(runs)
  found: dict[tuple[str, str], Difference] = {}
  for task in {task for task, _ in grouped}:
    if (task, reference) not in grouped:
      continue
    base = [run.accuracy for run in grouped[task, reference]]
    tested = {}
    for (other, attention), rows in grouped.items():
      if other == task and attention != reference:
        tested[attention] = welch([run.accuracy for run in rows], base)
    ps = {name: p for name, (_, _, p) in tested.items() if p is not None}
    corrected = holm(ps)
    for name, (points, half_width, _) in tested.items():
      p = corrected.get(name)
      verdict = UNKNOWN if p is None else EQUAL
      if p is not None and p < LEVEL:
        verdict = BETTER if points > 0 else WORSE
      found[task, name] = Difference(points, half_width, p, verdict)
  return found


def welch(
  one: Sequence[float], two: Sequence[float]
) -> tuple[float, float | None, float | None]:
  """Difference of means, half of its 95 % interval, and p.

  The last two are None if either has one value, or if neither varies: then no
  scale is known to measure the difference by.

  Example:
    >>> points, half_width, p = welch([1.0, 2.0, 3.0], [11.0, 12.0, 13.0])
    >>> points, round(half_width, 2), p < 0.001
    (-10.0, 2.27, True)
  """
  # Rounded: the sum's last bits are no difference.
  points = round(statistics.fmean(one) - statistics.fmean(two), 9) + 0.0
  if min(len(one), len(two)) < 2 or len(set(one)) == len(set(two)) == 1:
    return points, None, None
  test = stats.ttest_ind(one, two, equal_var=False)
  interval = test.confidence_interval(1.0 - LEVEL)
  half_width = float(interval.high - interval.low) / 2.0
  return points, half_width, float(test.pvalue)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
  """Holm's step-down correction of p-values.

  Example:
    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
  """
  corrected, largest = {}, 0.0
  for i, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
    largest = max(largest, min(1.0, p * (len(ps) - i)))
    corrected[name] = largest
  return corrected


def test_set_error(run: Run) -> float:
  """Standard error of its accuracy from the size of the test set, in points."""
  share = run.accuracy / 100.0
  count = run.data["test"]["num_examples"]
  return 100.0 * math.sqrt(share * (1.0 - share) / count)


@functools.cache
def paper_figures() -> dict[tuple[str, str], dict[str, Any]]:
  """The authors' own figures by (attention, task); not measured here.

  The table "Algorithms" in the README of
  https://github.com/cruiseresearchgroup/spectraformer, read in October 2025's
  version: accuracy and its standard deviation in per cent, hours, gigabytes.

  Example:
    >>> paper_figures()["oprf-orf", "listops"]["accuracy"]
    38.05
  """
  path = importlib.resources.files(__package__) / "paper.csv"
  with path.open() as file:
    return {
      (row["attention"], row["task"]): {
        name: text if name == "paper_name" else float(text)
        for name, text in row.items()
        if name not in ("attention", "task")
      }
      for row in csv.DictReader(file)
    }
