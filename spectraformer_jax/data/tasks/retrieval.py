"""Retrieval of Long Range Arena: whether one paper cites the other.

Reads two documents as bytes: an id is a byte plus one; each document is cut
after `max_len` bytes.

Source: Tay et al., "Long Range Arena", 2021, section 2.2.3.
"""

import dataclasses
import functools
import os

from spectraformer_jax.data.readers import aan, reader
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import TWO_CLASS_BYTES, Source, with_max_len
from spectraformer_jax.registry import check_choice, check_int

MAX_LEN = 4000


@TASKS.register("retrieval")
def retrieval(
  *,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
  literal: str = "keep",
  max_len: int = MAX_LEN,
) -> Source:
  """Returns the task, from the files in `data_dir`.

  Args:
    seed: without effect, since the files have three splits.
    data_dir: the folder of the files, or one up to three levels above it.
    literal: ``"keep"`` reads the texts as the files print them, as published
      results do; ``"decode"`` reads the bytes that they mean, see :mod:`aan`.
    max_len: number of bytes kept of each document.

  Raises:
    ValueError: if an option is unknown or out of range, or files are missing.
  """
  check_choice("literal", literal, aan.LITERALS)
  length = check_int("max_len", max_len, 1)
  found = reader.find_data(
    "retrieval", data_dir, instead=("mail_replies", "same_speech")
  )
  if literal == "decode":
    if found.layout != "AAN pairs":
      raise ValueError(
        f"literal='decode' needs AAN pairs as TSV, found {found.layout}."
      )
    read = functools.partial(aan.read_examples, found.folder, literal=literal)
    found = dataclasses.replace(found, examples=read, mark="-decoded")
  return reader.make_source(
    found,
    reader.OWN_SPLITS,
    name=with_max_len("retrieval", length, MAX_LEN),
    seed=seed,
    settings={"literal": literal},
    length=length,
    pair=True,
    **TWO_CLASS_BYTES,
  )
