"""What simple rules reach: the figures that every result stands beside."""

from collections.abc import Mapping

import numpy as np

from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.source import Rule

MAJORITY = "majority label"


def count_labels(
  dataset: Dataset, rules: Mapping[str, Rule]
) -> dict[str, list[list[int]]]:
  """For each rule, how often each label occurs in each of its groups."""
  majority = {MAJORITY: lambda dataset: np.zeros(len(dataset), np.int64)}
  tables = {}
  for name, rule in (majority | dict(rules)).items():
    groups = rule(dataset)
    table = np.zeros((groups.max() + 1, dataset.num_classes), np.int64)
    np.add.at(table, (groups, dataset.labels), 1)
    tables[name] = table.tolist()
  return tables


def accuracy(fitted: list[list[int]], scored: list[list[int]]) -> float:
  """Accuracy of the best label per group of one table, on another table.

  Groups that the first table lacks get its commonest label.

  Example:
    >>> accuracy([[9, 1], [2, 8]], [[4, 1], [0, 5]])
    0.9
  """
  fitted, scored = np.asarray(fitted), np.asarray(scored)
  guesses = np.full(len(scored), fitted.sum(axis=0).argmax())
  shared = min(len(fitted), len(scored))
  best, seen = fitted.argmax(axis=1), fitted.any(axis=1)
  guesses[:shared] = np.where(seen, best, guesses[0])[:shared]
  return float(scored[np.arange(len(scored)), guesses].sum() / scored.sum())
