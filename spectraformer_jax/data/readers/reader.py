"""Registers readers of users' files, and makes tasks of their examples.

A reader is a function that looks for its files below a folder and returns
:class:`TaskFiles`, or None. It is registered for the tasks whose files it
reads::

    @reads("text", files="aclImdb/{train,test}/{neg,pos}/<id>_<stars>.txt")
    def find_aclimdb(root: pathlib.Path) -> TaskFiles | None: ...

A reader streams its examples: only readers of pickles hold all examples of a
file in memory.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spectraformer_jax.data.find import LOGGER, describe, open_root
from spectraformer_jax.data.hash_split import split_by_content
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import SPLITS, ReportProgress, Source
from spectraformer_jax.data.writer import Writer

ARCHIVE = (
  "the archive is lra_release.gz "
  "(https://storage.googleapis.com/long-range-arena/lra_release.gz)"
)

# A chunk is complete when it has as many examples or tokens as this.
_CHUNK_EXAMPLES = 1024
_CHUNK_TOKENS = 2**22

_LABEL = re.compile(r"\d{1,9}(\.0*)?", re.ASCII)

Plan = Sequence[tuple[str, Mapping[str, float]]]
"""For each pass, the part of the files that it reads and each split's share."""

OWN_SPLITS: Plan = [(split, {split: 1.0}) for split in SPLITS]
"""For files with three splits."""

HOLDOUT: Plan = [("train", {"train": 0.9, "dev": 0.1}), ("test", {"test": 1.0})]
"""For files without a dev split: 10 % of the training examples, by content."""


class Example(NamedTuple):
  """Holds an example: stored tokens, not yet cut to length, and the label."""

  tokens: np.ndarray
  label: int
  tokens_2: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFiles:
  """Describes files that hold a task.

  Attributes:
    folder: the folder of the files.
    layout: name of the layout of the files.
    parts: the parts of the files (``"train"``, ``"dev"``, ``"test"`` or
      ``"all"``), with the expected number of examples of each.
    examples: yields the examples of a part, in an order that depends on the
      files only.
    checksum: hash of the files.
    mark: appended to the task's name if the content differs from the published
      form.
    provenance: see :class:`Facts`.
    tokenizer: the one that made the files; None if the task chooses one.
  """

  folder: pathlib.Path
  layout: str
  parts: Mapping[str, int]
  examples: Callable[[str], Iterator[Example]]
  checksum: str
  mark: str = ""
  provenance: str = "lra-files"
  tokenizer: str | None = None


Reader = Callable[[pathlib.Path], TaskFiles | None]

_READERS: dict[str, list[tuple[str, Reader]]] = {}


def reads(*tasks: str, files: str) -> Callable[[Reader], Reader]:
  """Registers the decorated reader; `files` describes what it looks for."""

  def register(reader: Reader) -> Reader:
    for task in tasks:
      _READERS.setdefault(task, []).append((files, reader))
    return reader

  return register


def find_data(
  task: str,
  data_dir: str | os.PathLike | None,
  *,
  origin: str = ARCHIVE,
  instead: Sequence[str] = (),
) -> TaskFiles:
  """Finds the files of a task below a folder.

  Args:
    task: name of the task.
    data_dir: the folder of the files, or one up to three levels above it.
    origin: source of the files, for messages.
    instead: tasks that need no files, for messages.

  Raises:
    ValueError: if `data_dir` is None or not a folder, or holds no files of the
      task, or holds files in two layouts.
  """
  names = [repr(name) for name in instead if name in TASKS.names()]
  without = f"; without the files try {' or '.join(names)}" if names else ""
  wanted = " or ".join(files for files, _ in _READERS[task])
  if data_dir is None:
    raise ValueError(
      f"task {task!r} needs data_dir=, a folder with {wanted}; {origin}"
      f"{without}."
    )
  root = open_root(data_dir)
  found = [hit for _, reader in _READERS[task] if (hit := reader(root))]
  if not found:
    raise ValueError(
      f"data_dir={str(data_dir)!r} must hold {wanted}, at most three levels "
      f"down; {origin}{without}. Searched {root}: {describe(root)}"
    )
  if len(found) > 1:
    both = " and ".join(f"{hit.layout} in {hit.folder}" for hit in found)
    raise ValueError(
      f"data_dir={str(data_dir)!r} must hold one form of {task!r}, found "
      f"{both}; point it at one of them."
    )
  LOGGER.info("%s: %s in %s", task, found[0].layout, found[0].folder)
  return found[0]


def make_source(
  found: TaskFiles,
  plan: Plan,
  *,
  name: str,
  seed: int,
  settings: Mapping[str, Any] | None = None,
  **facts: Any,
) -> Source:
  """Returns the task that `found` holds.

  Args:
    found: files of the task.
    plan: one entry per pass; a part with several splits is divided by content.
    name: name of the task, without the mark of the files.
    seed: seed of the division by content.
    settings: additional settings of :class:`Facts`.
    **facts: attributes of :class:`Facts`. Sequences are cut to ``length``.
  """
  divided = any(len(shares) > 1 for _, shares in plan)
  passes = tuple(tuple(shares) for _, shares in plan)

  def write(writers: Mapping[str, Writer], progress: ReportProgress) -> None:
    part, shares = plan[passes.index(tuple(writers))]
    done = 0
    for chunk in _chunks(found.examples(part)):
      for split, examples in _divide(chunk, shares, seed).items():
        _append(writers[split], examples, facts["length"])
      done += len(chunk)
      progress(done, max(done, found.parts[part]))
    progress(done, done)
    for split, writer in writers.items():
      if not writer.num_examples:
        raise ValueError(
          f"{found.folder}: none of its {done} examples ({found.layout}, "
          f"{part}) falls into the split {split!r}, which would be a split of "
          "no examples."
        )

  return Source(
    name=name + found.mark,
    provenance=found.provenance,
    settings={
      "reader": found.layout,
      "checksum": found.checksum,
      "plan": plan,
      **({"seed": seed} if divided else {}),
      **(settings or {}),
    },
    passes=passes,
    write=write,
    **facts,
  )


def check_label(label: Any, num_classes: int, where: str) -> int:
  """Returns a label as an int; accepts ``1`` and ``1.0``, also as text.

  Example:
    >>> check_label(b"1.0", 2, "pairs.tsv line 3")
    1
  """
  if isinstance(label, np.ndarray) and label.shape == ():
    label = label.item()
  if isinstance(label, bytes):
    label = label.decode("utf-8", "replace")
  number = -1
  if isinstance(label, str):
    number = float(label) if _LABEL.fullmatch(label) else -1
  elif isinstance(label, (bool, int, float, np.bool_, np.integer, np.floating)):
    number = label
  if not (0 <= number < num_classes and number == int(number)):
    raise ValueError(
      f"{where}: the label must be an integer from 0 to {num_classes - 1}, got "
      f"{_shown(label)}."
    )
  return int(number)


def _shown(label: Any) -> str:
  """Describes a label briefly for a message; nested values by their type."""
  if isinstance(label, str):
    return repr(label[:40])
  if isinstance(label, int) and label.bit_length() > 128:
    return f"an integer of {label.bit_length()} bits"
  if isinstance(label, (int, float, np.number, np.bool_)):
    return repr(str(label))
  if isinstance(label, np.ndarray):
    return "an array"
  return f"a {type(label).__name__}"


def _chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
  """Yields lists of examples, limited in number and in tokens."""
  chunk, size = [], 0
  for example in examples:
    chunk.append(example)
    size += len(example.tokens)
    size += 0 if example.tokens_2 is None else len(example.tokens_2)
    if len(chunk) == _CHUNK_EXAMPLES or size >= _CHUNK_TOKENS:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk


def _divide(
  examples: list[Example], shares: Mapping[str, float], seed: int
) -> dict[str, list[Example]]:
  """Returns the examples of each split: one split, or several by content."""
  if len(shares) == 1:
    return {split: examples for split in shares}
  parts = split_by_content(map(_content, examples), shares, seed)
  return {split: [examples[i] for i in parts[split]] for split in shares}


def _content(example: Example) -> bytes:
  """Returns bytes that are equal for equal sequences only."""
  first = example.tokens.tobytes()
  if example.tokens_2 is None:
    return first
  return b"%d:" % len(first) + first + example.tokens_2.tobytes()


def _append(writer: Writer, examples: list[Example], length: int) -> None:
  """Writes examples; cuts each sequence to its first `length` tokens."""
  if not examples:
    return
  labels = [example.label for example in examples]
  first = [example.tokens[:length] for example in examples]
  second = [e.tokens_2[:length] for e in examples if e.tokens_2 is not None]
  writer.append(*_flat(first), labels, *(_flat(second) if second else ()))


def _flat(sequences: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
  """Concatenates sequences; returns the tokens and the lengths."""
  return np.concatenate(sequences), [len(tokens) for tokens in sequences]
