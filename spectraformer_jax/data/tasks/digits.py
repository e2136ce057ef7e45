"""Handwritten digits, 8 x 8: the smallest real image task, for smoke tests.

Reads the 1,797 images of scikit-learn row by row as 64 tokens. A token is the
pixel itself, 0 to 16, as in the image tasks of Long Range Arena. Black is 0, as
is the padding of other tasks, so masks come from lengths and never from ids.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository, 1998; ``sklearn.datasets.load_digits``.
"""

from collections.abc import Mapping

import numpy as np

from spectraformer_jax.data.hash_split import SHARES, split_by_content
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import ReportProgress, Source
from spectraformer_jax.data.writer import Writer


@TASKS.register("digits")
def digits(*, seed: int = 0) -> Source:
  """Returns the task: about 80 % train, 10 % dev, 10 % test, by content.

  Args:
    seed: seed of the split by content.
  """

  def write(writers: Mapping[str, Writer], progress: ReportProgress) -> None:
    # Imported here: it takes a second, and only building the cache needs it.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.astype(np.uint8)
    parts = split_by_content(map(bytes, pixels), SHARES, seed)
    for split, writer in writers.items():
      chosen = pixels[parts[split]]
      lengths = np.full(len(chosen), chosen.shape[1])
      writer.append(chosen.ravel(), lengths, labels[parts[split]])
    progress(len(pixels), len(pixels))

  return Source(
    name="digits",
    tokenizer="pixels",
    provenance="stand-in",
    vocab_size=17,
    num_classes=10,
    length=64,
    settings={"seed": seed, "shares": SHARES},
    write=write,
  )
