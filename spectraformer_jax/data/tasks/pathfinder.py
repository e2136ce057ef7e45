"""Pathfinder of Long Range Arena: whether a path joins two discs.

Reads 32 x 32 pixels row by row; a token is a pixel, 0 to 255. Contours have 14
bars. Most pixels are black, which is 0, as is the padding of other tasks, so
masks come from lengths. Long Range Arena splits 80/10/10 in the order of
TensorFlow Datasets. That order comes from a hash of keys that the files lack,
so here the split is by content.

Source: Tay et al., "Long Range Arena", 2021, section 2.2.5.
"""

import os

from spectraformer_jax.data.hash_split import SHARES
from spectraformer_jax.data.readers import reader
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import Source


@TASKS.register("pathfinder")
def pathfinder(
  *, seed: int = 0, data_dir: str | os.PathLike | None = None
) -> Source:
  """Returns the task, from the files in `data_dir`.

  Args:
    seed: seed of the split by content, if the files have no splits.
    data_dir: the folder of the files, or one up to three levels above it.

  Raises:
    ValueError: if the files are missing.
  """
  return from_files("pathfinder", 32, seed, data_dir)


def from_files(
  name: str, side: int, seed: int, data_dir: str | os.PathLike | None
) -> Source:
  """Returns a task of Pathfinder images of `side` x `side` pixels."""
  found = reader.find_data(name, data_dir, instead=("pathfinder_synthetic",))
  return reader.make_source(
    found,
    [("all", SHARES)] if "all" in found.parts else reader.OWN_SPLITS,
    name=name,
    seed=seed,
    tokenizer="pixels",
    vocab_size=256,
    num_classes=2,
    length=side * side,
  )
