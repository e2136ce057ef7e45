"""Reads the folder ``aclImdb``: movie reviews as text files, by label.

``{train,test}/{neg,pos}/<id>_<stars>.txt``; ``unsup`` has no labels and is left
out. Leading and trailing white space is stripped, as in TensorFlow Datasets,
the source of Long Range Arena's reviews. All other bytes are kept, even invalid
UTF-8 and a byte order mark.

Source: Maas et al., "Learning Word Vectors for Sentiment Analysis", 2011.
"""

import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping

import numpy as np

from spectraformer_jax.data.find import checksum, innermost, read_plain
from spectraformer_jax.data.readers.reader import Example, TaskFiles, reads

LABELS = ("neg", "pos")
PARTS = ("train", "test")

_NAME = re.compile(r"(\d+)_\d+\.txt")


@reads("text", files="aclImdb/{train,test}/{neg,pos}/<id>_<stars>.txt")
def find_aclimdb(root: pathlib.Path) -> TaskFiles | None:
  """Finds the folder of ``train/pos`` and ``train/neg``."""
  folder = innermost(
    root, lambda f: any((f / "train" / label).is_dir() for label in LABELS)
  )
  if folder is None:
    return None
  paths = {part: _list(folder, part) for part in PARTS}
  return TaskFiles(
    folder=folder,
    layout="aclImdb folder",
    parts={part: len(reviews) for part, reviews in paths.items()},
    examples=lambda part: _examples(paths[part]),
    checksum=_checksum(folder, paths),
  )


def _list(folder: pathlib.Path, part: str) -> list[tuple[pathlib.Path, int]]:
  """Returns path and label of each review, sorted by label and id."""
  reviews = []
  for label, name in enumerate(LABELS):
    source = folder / part / name
    if not source.is_dir():
      raise ValueError(
        f"{folder} must hold {{train,test}}/{{neg,pos}}, found no "
        f"{part}/{name}; unpack the archive again."
      )
    numbered = []
    for path in source.iterdir():
      if path.name.startswith("."):
        continue
      match = _NAME.fullmatch(path.name)
      if not match:
        raise ValueError(f"{path} must be called <id>_<stars>.txt.")
      numbered.append((int(match[1]), path.name))
    if not numbered:
      raise ValueError(
        f"{source} must hold reviews <id>_<stars>.txt, it holds none; unpack "
        "the archive again."
      )
    reviews += [(source / name, label) for _, name in sorted(numbered)]
  return reviews


def _examples(reviews: list[tuple[pathlib.Path, int]]) -> Iterator[Example]:
  """Yields the bytes and the label of each review."""
  for path, label in reviews:
    text = read_plain(path).strip()
    if not text:
      raise ValueError(f"{path} must hold a review, it is empty.")
    yield Example(np.frombuffer(text, np.uint8), label)


def _checksum(
  folder: pathlib.Path, paths: Mapping[str, list[tuple[pathlib.Path, int]]]
) -> str:
  """Returns a hash of all names and of each part's first and last review."""
  digest = hashlib.sha256()
  for part, reviews in paths.items():
    names = "\n".join(f"{path.parent.name}/{path.name}" for path, _ in reviews)
    ends = [path for path, _ in reviews[:1] + reviews[-1:]]
    digest.update(f"{part}\n{names}\n{checksum(ends, folder)}".encode())
  return digest.hexdigest()[:16]
