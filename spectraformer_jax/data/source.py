"""What a task hands over: its facts, and how to write its splits."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from spectraformer_jax.data.dataset import Dataset, Facts
from spectraformer_jax.data.writer import Writer

SPLITS = ("train", "dev", "test")

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)``, in examples, while a split is built."""

Rule = Callable[[Dataset], np.ndarray]
"""Sorts the examples of a dataset into groups: ``[num_examples]`` ints >= 0."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source(Facts):
  """A task that can be built: :class:`Facts` and these.

  Attributes:
    write: called as ``write(writers, progress)``, appends every example of the
      splits that `writers` names. Must depend on the facts alone: two runs
      write the same examples in the same order.
    passes: which splits are written by one call; splits that share a pass come
      from one reading (a content-hash split) or must avoid each other.
    rules: baseline name to rule. The baseline guesses the commonest training
      label of the example's group. "majority label" is always added.
  """

  write: Callable[[Mapping[str, Writer], Progress], None]
  passes: tuple[tuple[str, ...], ...] = (SPLITS,)
  rules: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
