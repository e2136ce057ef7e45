"""Text of Long Range Arena: the sentiment of a movie review, byte by byte.

An id is a byte plus one; a review is cut after `max_len` bytes. The files have
no validation set. With ``val="holdout"``, dev is 10 % of the training reviews,
by content, so that repeats stay together. With ``val="lra"``, dev is the test
set, as in the code of Long Range Arena and its descendants: the best-dev
checkpoint is then chosen on the test set. The task's name states this.

Source: Tay et al., "Long Range Arena", 2021, section 2.2.2; Maas et al.,
"Learning Word Vectors for Sentiment Analysis", 2011.
"""

import os

from spectraformer_jax.data.readers import reader
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import TWO_CLASS_BYTES, Source, with_max_len
from spectraformer_jax.registry import check_choice, check_int

MAX_LEN = 4000
VALS = ("holdout", "lra")

ORIGIN = (
  "the archive is aclImdb_v1.tar.gz (https://ai.stanford.edu/~amaas/data/"
  "sentiment/)"
)


@TASKS.register("text")
def text(
  *,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
  val: str = "holdout",
  max_len: int = MAX_LEN,
) -> Source:
  """Returns the task, from the files in `data_dir`.

  Args:
    seed: seed of the split by content, with ``val="holdout"``.
    data_dir: the folder of the files, or one up to three levels above it.
    val: ``"holdout"`` to hold out training reviews as dev, or ``"lra"`` to use
      the test set as dev.
    max_len: number of bytes kept of a review. Published figures use 4000; the
      base config of Long Range Arena has 1000.

  Raises:
    ValueError: if an option is unknown or out of range, or files are missing.
  """
  check_choice("val", val, VALS)
  length = check_int("max_len", max_len, 1)
  found = reader.find_data(
    "text", data_dir, origin=ORIGIN, instead=("imdb_half", "spam_bodies")
  )
  if val == "holdout":
    plan = reader.HOLDOUT
  else:
    dev = "dev" if "dev" in found.parts else "test"
    plan = [
      ("train", {"train": 1.0}),
      (dev, {"dev": 1.0}),
      ("test", {"test": 1.0}),
    ]
  name = "text-dev_holdout" if val == "holdout" else "text-dev_is_test"
  return reader.make_source(
    found,
    plan,
    name=with_max_len(name, length, MAX_LEN),
    seed=seed,
    length=length,
    **TWO_CLASS_BYTES,
  )
