"""Describes a task that can be built: its facts and how to write its splits."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from spectraformer_jax.data.dataset import Dataset, Facts
from spectraformer_jax.data.writer import Writer

SPLITS = ("train", "dev", "test")

ReportProgress = Callable[[int, int], None]
"""Called as ``progress(done, total)``, in examples, while splits are built."""

TWO_CLASS_BYTES = {
  "tokenizer": "bytes",
  "vocab_size": 257,
  "num_classes": 2,
  "id_shift": 1,
}
"""Facts of byte texts of two classes: an id is a byte plus 1, 0 is padding."""

Rule = Callable[[Dataset], np.ndarray]
"""Returns the group of each example as ``[num_examples]`` ints >= 0."""


def with_max_len(name: str, max_len: int, default: int) -> str:
  """Returns the name of a task, with `max_len` unless it is the default.

  Example:
    >>> with_max_len("text", 4000, 4000), with_max_len("text", 500, 4000)
    ('text', 'text-max_len500')
  """
  return name if max_len == default else f"{name}-max_len{max_len}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source(Facts):
  """Describes a task that can be built.

  Attributes:
    write: called as ``write(writers, progress)``; appends every example of the
      splits in `writers`. The examples and their order must depend on the
      facts alone.
    passes: tuples of splits; one call of `write` writes the splits of one
      tuple. Splits belong to one tuple if one reading of the data yields them
      (a split by content) or if they must not share examples.
    rules: maps the name of a baseline to its rule. The baseline guesses the
      most frequent training label of the example's group. "majority label" is
      always added.
  """

  write: Callable[[Mapping[str, Writer], ReportProgress], None]
  passes: tuple[tuple[str, ...], ...] = (SPLITS,)
  rules: Mapping[str, Rule] = dataclasses.field(default_factory=dict)
