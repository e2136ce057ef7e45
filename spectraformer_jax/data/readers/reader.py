"""Readers of files that users bring, and how their rows become a task.

A reader is a function that looks for its files under a folder and returns what
it :class:`TaskFiles`, or None. It is registered for the tasks it serves::

    @reads("text", files="aclImdb/{train,test}/{neg,pos}/<id>_<stars>.txt")
    def find_aclimdb(root: pathlib.Path) -> TaskFiles | None: ...

Its rows are streamed: no reader holds more than a chunk of them.
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
from spectraformer_jax.data.source import ReportProgress, Source
from spectraformer_jax.data.writer import Writer

ARCHIVE = (
  "the archive is lra_release.gz "
  "(https://storage.googleapis.com/long-range-arena/lra_release.gz)"
)

_CHUNK_ROWS = 1024
_CHUNK_TOKENS = 2**22

_LABEL = re.compile(r"\d{1,9}(\.0*)?", re.ASCII)

Plan = Sequence[tuple[str, Mapping[str, float]]]
"""Which part of the files each pass reads, and the split's share in it."""


class Example(NamedTuple):
  """One example: stored tokens, not yet cut to length, and the label."""

  tokens: np.ndarray
  label: int
  tokens_2: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFiles:
  """Files that hold a task.

  Attributes:
    folder: where they lie.
    what: the layout, with the version of its reader.
    parts: the parts that the files come in, with the number of rows to expect
      in each; ``"train"``, ``"dev"``, ``"test"`` or ``"all"``.
    rows: part to its rows, in an order that depends on the files alone.
    checksum: changes with the files.
    mark: put behind the task's name where the content departs from the
      published form.
    provenance: see :class:`Facts`.
    tokenizer: where the files decide it.
  """

  folder: pathlib.Path
  what: str
  parts: Mapping[str, int]
  rows: Callable[[str], Iterator[Example]]
  checksum: str
  mark: str = ""
  provenance: str = "lra-files"
  tokenizer: str | None = None


Reader = Callable[[pathlib.Path], TaskFiles | None]

_READERS: dict[str, list[tuple[str, Reader]]] = {}


def reads(*tasks: str, files: str) -> Callable[[Reader], Reader]:
  """Decorator that registers a reader; `files` says what it looks for."""

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
  """What a folder holds for a task.

  Args:
    task: name of the task.
    data_dir: the folder, or one up to three levels above it.
    origin: where the files come from, for messages.
    instead: tasks to try without them; those that are not registered are left
      out.

  Raises:
    ValueError: if there is none, no folder, nothing in it, or two layouts.
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
    both = " and ".join(f"{hit.what} in {hit.folder}" for hit in found)
    raise ValueError(
      f"data_dir={str(data_dir)!r} must hold one form of {task!r}, found "
      f"{both}; point it at one of them."
    )
  LOGGER.info("%s: %s in %s", task, found[0].what, found[0].folder)
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
  """The task that these files hold.

  Args:
    found: the files.
    plan: one entry per pass; a part with several splits is divided by content.
    name: of the task, without the files' own mark.
    seed: of that division; without one it has no effect.
    settings: more that decides the content.
    **facts: attributes of :class:`Facts`. Sequences are cut to ``length``.
  """
  divided = any(len(shares) > 1 for _, shares in plan)
  passes = tuple(tuple(shares) for _, shares in plan)

  def write(writers: Mapping[str, Writer], progress: ReportProgress) -> None:
    part, shares = plan[passes.index(tuple(writers))]
    done = 0
    for chunk in _chunks(found.rows(part)):
      for split, rows in _divide(chunk, shares, seed).items():
        _append(writers[split], rows, facts["length"])
      done += len(chunk)
      progress(done, max(done, found.parts[part]))
    progress(done, done)
    for split, writer in writers.items():
      if not writer.num_examples:
        raise ValueError(
          f"{found.folder}: none of its {done} examples ({found.what}, {part}) "
          f"falls into the split {split!r}, which would be a split of no "
          "examples."
        )

  return Source(
    name=name + found.mark,
    provenance=found.provenance,
    settings={
      "reader": found.what,
      "checksum": found.checksum,
      "plan": plan,
      **({"seed": seed} if divided else {}),
      **(settings or {}),
    },
    passes=passes,
    write=write,
    **facts,
  )


def own_splits() -> Plan:
  """The plan for files that come in three splits."""
  return [(split, {split: 1.0}) for split in ("train", "dev", "test")]


def check_label(label: Any, num_classes: int, where: str) -> int:
  """A label as an int; takes ``1``, ``1.0`` and texts of them.

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
  """A label for a message: neither long nor, if it is nested, written out."""
  if isinstance(label, str):
    return repr(label[:40])
  if isinstance(label, int) and label.bit_length() > 128:
    return f"an integer of {label.bit_length()} bits"
  if isinstance(label, (int, float, np.number, np.bool_)):
    return repr(str(label))
  if isinstance(label, np.ndarray):
    return "an array"
  return f"a {type(label).__name__}"


def _chunks(rows: Iterator[Example]) -> Iterator[list[Example]]:
  """Rows in lists that are small in number and in tokens."""
  chunk, size = [], 0
  for row in rows:
    chunk.append(row)
    size += len(row.tokens)
    size += 0 if row.tokens_2 is None else len(row.tokens_2)
    if len(chunk) == _CHUNK_ROWS or size >= _CHUNK_TOKENS:
      yield chunk
      chunk, size = [], 0
  if chunk:
    yield chunk


def _divide(
  rows: list[Example], shares: Mapping[str, float], seed: int
) -> dict[str, list[Example]]:
  """The rows of each split: all of one, or by content."""
  if len(shares) == 1:
    return {split: rows for split in shares}
  parts = split_by_content(map(_content, rows), shares, seed)
  return {split: [rows[i] for i in parts[split]] for split in shares}


def _content(row: Example) -> bytes:
  """What two equal examples have in common."""
  if row.tokens_2 is None:
    return row.tokens.tobytes()
  first = row.tokens.tobytes()
  return b"%d:" % len(first) + first + row.tokens_2.tobytes()


def _append(writer: Writer, rows: list[Example], length: int) -> None:
  """Writes rows, each sequence cut to its first `length` tokens."""
  if not rows:
    return
  labels = [row.label for row in rows]
  columns = _flat([row.tokens[:length] for row in rows])
  if rows[0].tokens_2 is None:
    writer.append(*columns, labels)
  else:
    writer.append(*columns, labels, *_flat([r.tokens_2[:length] for r in rows]))


def _flat(sequences: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
  """Sequences laid end to end, and their lengths."""
  return np.concatenate(sequences), [len(tokens) for tokens in sequences]
