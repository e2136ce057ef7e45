"""Image of Long Range Arena: CIFAR-10 in gray, one token per pixel.

Reads 32 x 32 pixels row by row; a token is a pixel, 0 to 255. Black is 0, as is
the padding of other tasks, so masks come from lengths.

Source: Tay et al., "Long Range Arena", 2021, section 2.2.4.
"""

import os

from spectraformer_jax.data.readers import reader
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import Source

ORIGIN = (
  "the archive is cifar-10-binary.tar.gz "
  "(https://www.cs.toronto.edu/~kriz/cifar.html)"
)


@TASKS.register("image")
def image(
  *, seed: int = 0, data_dir: str | os.PathLike | None = None
) -> Source:
  """Returns the task, from the files in `data_dir`.

  Args:
    seed: seed of the split of the training images by content (90 % train, 10 %
      dev), if the files do not have three splits.
    data_dir: the folder of the files, or one up to three levels above it.

  Raises:
    ValueError: if the files are missing.
  """
  found = reader.find_data(
    "image", data_dir, origin=ORIGIN, instead=("fashion",)
  )
  return reader.make_source(
    found,
    reader.OWN_SPLITS if "dev" in found.parts else reader.HOLDOUT,
    name="image",
    seed=seed,
    tokenizer="pixels",
    vocab_size=256,
    num_classes=10,
    length=32 * 32,
  )
