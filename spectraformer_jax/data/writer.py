"""Writes one split to a folder, a chunk of examples at a time."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spectraformer_jax.data.dataset import Facts, cast


class Writer:
  """Receives the examples of one split in order and writes them.

  Each call writes its tokens to disk, so a split may be larger than memory.

  Args:
    folder: an empty folder.
    facts: facts of the task; they decide the type of the stored tokens.

  Example:
    >>> import tempfile
    >>> facts = Facts(name="toy", vocab_size=5, num_classes=2, length=4)
    >>> writer = Writer(pathlib.Path(tempfile.mkdtemp()), facts)
    >>> writer.append([1, 2, 3], lengths=[2, 1], labels=[0, 1])
    >>> writer.num_examples
    2
    >>> writer.finish()
  """

  def __init__(self, folder: pathlib.Path, facts: Facts) -> None:
    self._folder = folder
    self._facts = facts
    self._labels: list[np.ndarray] = []
    self._columns = [_Column(folder, "", facts.token_dtype)]
    if facts.pair:
      self._columns.append(_Column(folder, "_2", facts.token_dtype))
    self.num_examples = 0

  def append(
    self,
    tokens: ArrayLike,
    lengths: ArrayLike,
    labels: ArrayLike,
    tokens_2: ArrayLike | None = None,
    lengths_2: ArrayLike | None = None,
  ) -> None:
    """Adds examples.

    Args:
      tokens: stored tokens of the examples, concatenated, ``[sum(lengths)]``
        integers.
      lengths: number of tokens of each example, ``[count]`` integers.
      labels: label of each example, ``[count]`` integers.
      tokens_2: tokens of the second sequences, for tasks of pairs.
      lengths_2: the lengths of the second sequences.

    Raises:
      ValueError: if the lengths do not match the tokens or the labels, or a
        number does not fit its type.
    """
    labels = cast("labels", labels, np.dtype(np.int32))
    sequences = [(tokens, lengths), (tokens_2, lengths_2)]
    for column, sequence in zip(self._columns, sequences, strict=False):
      column.append(*sequence, count=len(labels))
    self._labels.append(labels)
    self.num_examples += len(labels)

  def finish(self) -> None:
    """Completes the array files; raises ValueError if there is no example."""
    self.close()
    if self.num_examples == 0:
      raise ValueError(f"task {self._facts.name!r} has a split of no examples.")
    for column in self._columns:
      column.save_offsets()
    np.save(self._folder / "labels.npy", np.concatenate(self._labels))

  def close(self) -> None:
    """Closes the token files, complete or not."""
    for column in self._columns:
      column.close()

  def save_meta(self, meta: Mapping[str, Any]) -> None:
    """Writes ``meta.json``, without which the cache cannot read the folder."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in meta.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (self._folder / "meta.json").write_text(text, encoding="utf-8")


class _Column:
  """Writes a flat token array that grows on disk, and its offsets."""

  def __init__(
    self, folder: pathlib.Path, suffix: str, dtype: np.dtype
  ) -> None:
    self._offsets_path = folder / f"offsets{suffix}.npy"
    self._dtype = dtype
    self._lengths: list[np.ndarray] = []
    self._size = 0
    self._file = open(folder / f"tokens{suffix}.npy", "wb")
    self._write_header()

  def append(
    self, tokens: ArrayLike | None, lengths: ArrayLike | None, count: int
  ) -> None:
    """Adds the sequences of `count` examples."""
    tokens = cast("tokens", tokens, self._dtype)
    lengths = cast("lengths", lengths, np.dtype(np.int64))
    if len(lengths) != count or lengths.sum() != len(tokens):
      raise ValueError(
        f"lengths must be one per label and add up to the tokens, got "
        f"{len(lengths)} lengths of sum {lengths.sum()} for {count} labels "
        f"and {len(tokens)} tokens."
      )
    self._file.write(np.ascontiguousarray(tokens).data)
    self._lengths.append(lengths)
    self._size += len(tokens)

  def save_offsets(self) -> None:
    """Writes the offsets of the sequences."""
    offsets = np.cumsum(np.concatenate([[0], *self._lengths]), dtype=np.int64)
    np.save(self._offsets_path, offsets)

  def close(self) -> None:
    """Writes the final size into the header and closes the file."""
    if not self._file.closed:
      self._file.seek(0)
      self._write_header()
      self._file.close()

  def _write_header(self) -> None:
    """Writes numpy's header, whose length does not change with the size."""
    header = {
      "descr": np.lib.format.dtype_to_descr(self._dtype),
      "fortran_order": False,
      "shape": (self._size,),
    }
    np.lib.format.write_array_header_1_0(self._file, header)
