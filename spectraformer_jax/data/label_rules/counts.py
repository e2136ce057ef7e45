"""Computes the accuracy of simple rules, to be stated beside every result."""

from collections.abc import Mapping

import numpy as np

from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.source import Rule

MAJORITY = "majority label"


def count_labels(
  dataset: Dataset, rules: Mapping[str, Rule]
) -> dict[str, list[list[int]]]:
  """Returns a table [groups, classes] of label counts for each rule."""
  majority = {MAJORITY: lambda dataset: np.zeros(len(dataset), np.int64)}
  tables = {}
  for name, rule in (majority | dict(rules)).items():
    groups = rule(dataset)
    table = np.zeros((groups.max() + 1, dataset.num_classes), np.int64)
    np.add.at(table, (groups, dataset.labels), 1)
    tables[name] = table.tolist()
  return tables


def accuracy(fitted: list[list[int]], scored: list[list[int]]) -> float:
  """Returns the accuracy of guessing the most frequent label of each group.

  The guesses come from the table `fitted` and are scored on the table `scored`.
  For a group that `fitted` lacks, the guess is the most frequent label of all.

  Example:
    >>> accuracy([[9, 1], [2, 8]], [[4, 1], [0, 5]])
    0.9
  """
  train, test = np.asarray(fitted), np.asarray(scored)
  guesses = np.full(len(test), train.sum(axis=0).argmax())
  shared = min(len(train), len(test))
  best, seen = train.argmax(axis=1), train.any(axis=1)
  guesses[:shared] = np.where(seen, best, guesses[0])[:shared]
  return float(test[np.arange(len(test)), guesses].sum() / test.sum())
