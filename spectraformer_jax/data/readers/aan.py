"""Reads pairs of papers of the ACL Anthology Network from Long Range Arena.

``tsv_data/new_aan_pairs.{train,eval,test}.tsv``: label, two ids and two texts,
separated by tabs, without a header and without quoting. The files with
``only_ids`` in their name lack the texts.

Source: Radev et al., "The ACL Anthology Network Corpus", 2013.
"""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from spectraformer_jax.data import find
from spectraformer_jax.data.readers import reader

NAMES = {"train": "train", "dev": "eval", "test": "test"}
SIZES = {"train": 147_086, "dev": 18_090, "test": 17_437}
LITERALS = ("keep", "decode")

_PATTERN = "new_aan_pairs.{}.tsv"

# Matches the literals that Python prints for bytes, and nothing else.
_ESCAPE = rb"\\(?:[\\'\"nrt]|x[0-9a-f]{2})"
_PRINTED = re.compile(
  rb"b(?:'(?:[ -&(-\[\]-~]|%(e)b)*+'|\"(?:[ !#-\[\]-~]|%(e)b)*+\")"
  % {b"e": _ESCAPE}
)


@reader.reads("retrieval", files="tsv_data/new_aan_pairs.{train,eval,test}.tsv")
def find_aan(root: pathlib.Path) -> reader.TaskFiles | None:
  """Finds the folder of the pairs; reads texts as the files print them."""
  folder = find.folder_with(root, *(path.name for path in _paths(root)))
  if folder is None:
    _explain_only_ids(root)
    return None
  find.check_present(folder, _paths(folder))
  return reader.TaskFiles(
    folder=folder,
    layout="AAN pairs",
    parts=SIZES,
    examples=functools.partial(read_examples, folder),
    checksum=find.checksum(_paths(folder), folder),
  )


def read_examples(
  folder: pathlib.Path, split: str, literal: str = "keep"
) -> Iterator[reader.Example]:
  r"""Yields the pairs of one split.

  Args:
    folder: holds the files.
    split: ``"train"``, ``"dev"`` or ``"test"``.
    literal: how to read the texts, which are Python bytes as ``print`` shows
      them (``b'...'`` with ``\n`` as two characters). ``"keep"`` reads these
      characters; ``"decode"`` reads the bytes that they mean.

  Raises:
    ValueError: at the first malformed line, with its number.
  """
  path = folder / _PATTERN.format(NAMES[split])
  number = 0
  for number, line in find.read_lines(path):
    where = f"{path} line {number}"
    columns = line.split(b"\t")
    if len(columns) == 3:
      raise ValueError(f"{where}: {_only_ids('it has 3 columns')}")
    if len(columns) != 5:
      raise ValueError(
        f"{where}: expected 5 columns (label, id1, id2, text1, text2) with "
        f"tabs between them, got {len(columns)}."
      )
    if number == 1 and columns[0] == b"label":
      raise ValueError(f"{where}: expected no header, got one.")
    label = reader.check_label(columns[0], 2, where)
    texts = columns[3:]
    if literal == "decode":
      texts = [_decode(text, where) for text in texts]
    if not all(texts):
      raise ValueError(f"{where}: expected two texts, got an empty one.")
    first, second = (np.frombuffer(text, np.uint8) for text in texts)
    yield reader.Example(first, label, second)
  if not number:
    raise ValueError(f"{path} must hold pairs, it is empty.")


def _paths(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the paths of the three files."""
  return [folder / _PATTERN.format(name) for name in NAMES.values()]


def _decode(text: bytes, where: str) -> bytes:
  """Returns the bytes that a printed literal means."""
  if not _PRINTED.fullmatch(text):
    shown = text[:20].decode("utf-8", "replace")
    raise ValueError(
      f"{where}: literal='decode' needs texts printed as b'...', got "
      f"{shown!r}; use literal='keep'."
    )
  return ast.literal_eval(text.decode("ascii"))


def _explain_only_ids(root: pathlib.Path) -> None:
  """Raises ValueError if there are only the files without texts."""
  folder = find.innermost(
    root, lambda f: any(f.glob("*aan_pairs*only_ids*.tsv"))
  )
  if folder is not None:
    names = sorted(path.name for path in folder.glob("*only_ids*.tsv"))
    raise ValueError(_only_ids(f"{folder} holds {', '.join(names)}"))


def _only_ids(what: str) -> str:
  """Returns the message about pairs without texts."""
  return (
    f"{what}: these are the pairs by id alone, without their texts; take "
    "tsv_data/new_aan_pairs.{train,eval,test}.tsv of lra_release.gz."
  )
