"""Compares a task with figures of Long Range Arena.

Sizes are those of Long Range Arena's files and of the data sets that it uses;
those of Retrieval come from the Skyformer and Spectraformer configurations.
Statistics of the released ListOps are not published: lengths and label shares
here are those of 100,000 sequences of the same grammar.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.formats.listops_text import evaluate

# Number of examples of each split, or of several splits together.
SIZES = {
  "listops": {"train": 96_000, "dev": 2_000, "test": 2_000},
  "text": {"train+dev": 25_000, "test": 25_000},
  "retrieval": {"train": 147_086, "dev": 18_090, "test": 17_437},
  "image": {"train+dev": 50_000, "test": 10_000},
  "pathfinder": {"train+dev+test": 200_000},
  "pathx": {"train+dev+test": 200_000},
}
EMPTY_PICTURES = 10  # the most pictures that may be missing from Pathfinder

# Lengths and label shares of this number of sequences.
LISTOPS_DRAWS = 100_000
LISTOPS_MEAN_LENGTH = 1035.5
LISTOPS_LENGTH_DEVIATION = 394.0
_PER_10_000 = (1685, 909, 775, 825, 907, 854, 757, 717, 873, 1698)
LISTOPS_SHARES = tuple(count / 10_000 for count in _PER_10_000)
EVALUATED = 2_000  # expressions of each split whose value is computed

_ERRORS = 4  # a deviation up to this many standard errors counts as agreement


class Figure(NamedTuple):
  """Holds a comparison: subject, both values as text, whether they agree."""

  subject: str
  found: str
  expected: str
  agrees: bool


def compare(task: str, splits: Mapping[str, Dataset]) -> list[Figure]:
  """Compares the splits of a task with Long Range Arena.

  Args:
    task: name of the task; the result is empty if there are no figures for it.
    splits: the datasets by split.
  """
  if task not in SIZES:
    return []
  figures = list(_sizes(task, splits))
  if task in ("text", "image"):
    figures += _balance(splits)
  if task in ("pathfinder", "pathx"):
    figures.append(_halves(splits))
  if task == "listops":
    figures += _listops(splits)
  return figures


def describe(figures: list[Figure]) -> Iterator[str]:
  """Yields lines about the comparison."""
  if not figures:
    yield "Long Range Arena: no figures for this task"
    return
  wrong = sum(not figure.agrees for figure in figures)
  verdict = f"{wrong} figures differ" if wrong else "all figures agree"
  yield f"Long Range Arena: {verdict}"
  for subject, found, expected, agrees in figures:
    mark = "agrees " if agrees else "DIFFERS"
    yield f"  {mark} {subject}: {found}, expected {expected}"


def _sizes(task: str, splits: Mapping[str, Dataset]) -> Iterator[Figure]:
  """Compares the number of examples."""
  expected = dict(SIZES[task])
  if "dev_is_test" in splits["train"].name:
    expected = {"train": 25_000, "dev": 25_000, "test": 25_000}
  slack = EMPTY_PICTURES if task in ("pathfinder", "pathx") else 0
  for together, count in expected.items():
    found = sum(len(splits[split]) for split in together.split("+"))
    agrees = count - slack <= found <= count
    yield Figure(f"examples in {together}", f"{found:,}", f"{count:,}", agrees)


def _balance(splits: Mapping[str, Dataset]) -> Iterator[Figure]:
  """Compares the sizes of the classes, which are equal in IMDB and CIFAR-10."""
  train = "train" if "dev_is_test" in splits["train"].name else "train+dev"
  for together in ("test", train):
    labels = [splits[split].labels for split in together.split("+")]
    counts = np.bincount(
      np.concatenate(labels), minlength=splits["test"].num_classes
    )
    found = f"{counts.min():,} to {counts.max():,}"
    agrees = counts.min() == counts.max()
    yield Figure(f"examples per class in {together}", found, "equal", agrees)


def _halves(splits: Mapping[str, Dataset]) -> Figure:
  """Checks that about half of the images have a path between the discs."""
  labels = np.concatenate([dataset.labels for dataset in splits.values()])
  error = 0.5 / math.sqrt(len(labels))
  share = float(labels.mean())
  agrees = abs(share - 0.5) <= _ERRORS * error
  return Figure("images with a path", f"{share:.1%}", "about half", agrees)


def _listops(splits: Mapping[str, Dataset]) -> Iterator[Figure]:
  """Compares lengths, label shares, and labels with computed values."""
  full = splits["train"].tokenizer == "full"
  if full:
    lengths = np.concatenate([np.diff(d.offsets) for d in splits.values()])
    found = f"{lengths.min()} to {lengths.max()}"
    agrees = 500 < lengths.min() and lengths.max() < 2000
    yield Figure("lengths", found, "501 to 1999", agrees)
    error = LISTOPS_LENGTH_DEVIATION / math.sqrt(len(lengths))
    slack = _ERRORS * error
    agrees = abs(lengths.mean() - LISTOPS_MEAN_LENGTH) <= slack
    found, expected = f"{lengths.mean():.1f}", f"{LISTOPS_MEAN_LENGTH}"
    yield Figure("mean length", found, f"{expected} +- {slack:.1f}", agrees)
  labels = np.concatenate([dataset.labels for dataset in splits.values()])
  shares = np.bincount(labels, minlength=10) / len(labels)
  reference = np.array(LISTOPS_SHARES)
  samples = 1 / len(labels) + 1 / LISTOPS_DRAWS
  errors = np.sqrt(reference * (1 - reference) * samples)
  far = np.abs(shares - reference) > _ERRORS * errors
  found = " ".join(f"{share:.3f}" for share in shares)
  expected = " ".join(f"{share:.3f}" for share in LISTOPS_SHARES)
  yield Figure("label shares", found, expected, not far.any())
  if full:
    yield _values(splits)


def _values(splits: Mapping[str, Dataset]) -> Figure:
  """Computes the values of evenly spread expressions; compares the labels."""
  count, wrong, sampled = 0, [], []
  for split, dataset in splits.items():
    size = min(EVALUATED, len(dataset))
    if size < len(dataset):
      sampled.append(f"{size:,} of {len(dataset):,} in {split}")
    for i in np.linspace(0, len(dataset) - 1, size, dtype=int).tolist():
      example = dataset[i]
      value, label = _value(example["tokens"]), example["label"]
      count += 1
      if value != label:
        truth = "no expression" if value is None else f"value {value}"
        wrong.append(f"{split} example {i} has label {label} and {truth}")
  subject = "values that are right"
  if sampled:
    subject += f" (looked at {', '.join(sampled)})"
  found = f"{count - len(wrong)}" + (f" ({wrong[0]})" if wrong else "")
  return Figure(subject, found, f"{count}", not wrong)


def _value(tokens: np.ndarray) -> int | None:
  """Returns the value of an expression, or None if it is incomplete."""
  try:
    return evaluate(tokens.tolist())
  except ValueError:
    return None
