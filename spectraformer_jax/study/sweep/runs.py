"""Reads the finished runs of a sweep, groups them and compares them over seeds.

Reads only ``config.json`` and ``metrics.jsonl`` of each cell, so tables can be
made again without checkpoints.
"""

import contextlib
import csv
import functools
import math
import statistics
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from spectraformer_jax.study import SIGNIFICANCE
from spectraformer_jax.study.sweep.cells import CELL
from spectraformer_jax.train.run import run_folder
from spectraformer_jax.train.run.writers import read_rows, result_row


class Run(NamedTuple):
  """A finished cell.

  Attributes:
    task, attention, seed: the cell's labels.
    source: folder or archive that the run was read from.
    rows: the run's metrics; the last row holds its result.
    config, data: as config.json holds them.
    environment: versions and devices of the run's last start.
  """

  task: str
  attention: str
  seed: int
  source: Path
  rows: list[dict[str, Any]]
  config: Mapping[str, Any]
  data: Mapping[str, Any]
  environment: Mapping[str, Any]

  @property
  def result(self) -> Mapping[str, Any]:
    """The last row of the metrics."""
    return self.rows[-1]

  @property
  def accuracy(self) -> float:
    """Test accuracy of the best-dev parameters, in per cent."""
    return 100.0 * self.result["test/accuracy"]

  @property
  def sampling_error(self) -> float:
    """Standard error of the accuracy for this number of test examples."""
    share = self.accuracy / 100.0
    count = self.data["test"]["num_examples"]
    return 100.0 * math.sqrt(share * (1.0 - share) / count)

  @property
  def seconds(self) -> float:
    """Time of training, without compilation and evaluation."""
    return self.result["train_seconds"]

  @property
  def peak_bytes(self) -> int:
    """Peak memory of the device; of the process if the device reports none."""
    device = self.result["peak_device_bytes"]
    return self.result["peak_memory_bytes"] if device is None else device


class Difference(NamedTuple):
  """An attention against the reference on one task.

  Attributes:
    points: difference in test accuracy, positive if better than the reference.
    half_width: half of the 95 % confidence interval; None if `welch` gives
      none.
    p: of Welch's t-test over seeds, after Holm's correction; None if `welch`
      gives none.
    verdict: "better", "worse", "not significant", or "-" where p is None.
  """

  points: float
  half_width: float | None
  p: float | None
  verdict: str


class Published(NamedTuple):
  """The authors' figures for an attention on one task; not measured here.

  Attributes:
    accuracy, accuracy_sd: mean and standard deviation, in per cent.
    hours: time of training.
    gigabytes: memory.
  """

  accuracy: float
  accuracy_sd: float
  hours: float
  gigabytes: float


def read_runs(sources: Iterable[Path | str]) -> tuple[list[Run], list[str]]:
  """Reads all cells of one sweep.

  Args:
    sources: folders of the sweep, or tar archives of such folders; several if
      shards ran on several machines.

  Returns:
    The finished runs and the names of unfinished cells, both sorted by name.

  Raises:
    ValueError: no cell has finished, a cell has finished in two of the sources,
      or a file is no tar archive.
  """
  paths = list(map(Path, sources))
  runs: dict[str, Run] = {}
  unfinished: set[str] = set()
  for source in paths:
    with _as_folder(source) as folder:
      for path in sorted(folder.glob("*/*/seed*")):
        name = str(path.relative_to(folder))
        run = _read_run(path, source)
        if run is None:
          unfinished |= {name} if (path / CELL).exists() else set()
        elif name in runs:
          raise ValueError(
            f"{name} of {runs[name].source} and of {source} are the same cell."
          )
        else:
          runs[name] = run
  if not runs:
    raise ValueError(f"no finished cell in {', '.join(map(str, paths))}.")
  return [runs[name] for name in sorted(runs)], sorted(unfinished - set(runs))


@contextlib.contextmanager
def _as_folder(source: Path) -> Iterator[Path]:
  """Yields a folder as it is, and an archive unpacked until the block ends."""
  if not source.is_file():
    yield source
    return
  with tempfile.TemporaryDirectory() as folder:
    try:
      with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    except tarfile.TarError as error:
      raise ValueError(
        f"{str(source)!r} is no folder and no tar archive: {error}."
      ) from None
    yield Path(folder)


def _read_run(path: Path, source: Path) -> Run | None:
  """Reads the run in a cell's folder; None if it has not finished."""
  rows, stored = read_rows(path), run_folder.read_config(path)
  if result_row(rows) is None or stored is None:
    return None
  task, attention, seed = path.parts[-3:]
  return Run(
    task,
    attention,
    int(seed.removeprefix("seed")),
    source,
    rows,
    stored["config"],
    stored["data"],
    stored["environments"][-1],
  )


def group(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
  """Groups runs by (attention, task)."""
  groups: dict[tuple[str, str], list[Run]] = {}
  for run in runs:
    groups.setdefault((run.attention, run.task), []).append(run)
  return groups


def labels(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
  """Returns the tasks, and the attentions with the best first.

  Tasks of the paper come first, in its order. Attentions are sorted by the
  number of tasks that they have, then by mean accuracy over them.
  """
  means: dict[str, list[float]] = {}
  for (attention, _), seeds in group(runs).items():
    mean = statistics.fmean(run.accuracy for run in seeds)
    means.setdefault(attention, []).append(mean)
  order = list(dict.fromkeys(task for _, task in paper_figures()))
  tasks = sorted({run.task for run in runs})
  tasks.sort(key=lambda t: order.index(t) if t in order else len(order))
  rank = lambda name: (-len(means[name]), -statistics.fmean(means[name]), name)
  return tasks, sorted(means, key=rank)


def time_unit(runs: Iterable[Run]) -> tuple[str, int]:
  """Symbol and seconds of the unit for training times: "h" or "min"."""
  return ("h", 3600) if max(r.seconds for r in runs) > 3600 else ("min", 60)


def differences(
  runs: Iterable[Run], reference: str
) -> dict[tuple[str, str], Difference]:
  """Compares every attention with the reference, task by task.

  Applies Welch's t-test over seeds, two-sided, and Holm's correction over the
  attentions of a task. Seeds vary initialisation, projections, dropout and
  order of the training examples; they do not vary the test examples.

  Args:
    runs: finished runs.
    reference: label of an attention.

  Returns:
    (attention, task) -> difference, for tasks that the reference has.
  """
  accuracies = {
    key: [run.accuracy for run in seeds] for key, seeds in group(runs).items()
  }
  result: dict[tuple[str, str], Difference] = {}
  for base_name, task in list(accuracies):
    if base_name != reference:
      continue
    tests = {
      name: welch(values, accuracies[reference, task])
      for (name, other), values in accuracies.items()
      if other == task and name != reference
    }
    corrected = holm({n: p for n, (_, _, p) in tests.items() if p is not None})
    for name, (points, half_width, _) in tests.items():
      p = corrected.get(name)
      verdict = "-" if p is None else "not significant"
      if p is not None and p < SIGNIFICANCE:
        verdict = "better" if points > 0 else "worse"
      result[name, task] = Difference(points, half_width, p, verdict)
  return result


def welch(
  one: Sequence[float], two: Sequence[float]
) -> tuple[float, float | None, float | None]:
  """Returns the difference of means, half of its 95 % interval, and p.

  Interval and p are None if either sample has only one value, or if neither
  sample varies: the difference then has no standard error.

  Example:
    >>> points, half_width, p = welch([1.0, 2.0, 3.0], [11.0, 12.0, 13.0])
    >>> points, round(half_width, 2), p < 0.001
    (-10.0, 2.27, True)
  """
  # Rounded, so that equal means of floats differ by zero; + 0.0 undoes -0.0.
  points = round(statistics.fmean(one) - statistics.fmean(two), 9) + 0.0
  if min(len(one), len(two)) < 2 or len(set(one)) == len(set(two)) == 1:
    return points, None, None
  test: Any = stats.ttest_ind(one, two, equal_var=False)  # scipy has no types
  interval = test.confidence_interval(1.0 - SIGNIFICANCE)
  half_width = float(interval.high - interval.low) / 2.0
  return points, half_width, float(test.pvalue)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
  """Applies Holm's step-down correction to p-values.

  Example:
    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
  """
  corrected, largest = {}, 0.0
  for i, (name, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
    largest = max(largest, min(1.0, p * (len(ps) - i)))
    corrected[name] = largest
  return corrected


@functools.cache
def paper_figures() -> dict[tuple[str, str], Published]:
  """The authors' own figures by (attention, task).

  They are the table "Algorithms" in the README of
  https://github.com/cruiseresearchgroup/spectraformer, version of October 2025.

  Example:
    >>> paper_figures()["oprf-orf", "listops"].accuracy
    38.05
  """
  with Path(__file__).with_name("paper.csv").open() as file:
    return {
      (row["attention"], row["task"]): Published(
        *(float(row[name]) for name in Published._fields)
      )
      for row in csv.DictReader(file)
    }
