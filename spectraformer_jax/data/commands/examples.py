"""Prints texts and draws images of a dataset."""

import math
import pathlib
from collections.abc import Iterator

import numpy as np

from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.data.formats.listops_text import CLOSE, decode

COLUMNS = 8  # images of each label
SHOWN = 200  # characters of a text; of other tokens a third, as they are longer

_SMALLEST = 64  # pixels; smaller images are drawn about as large as this
_GAP = 4  # pixels between images


def show(
  dataset: Dataset, count: int, pictures: pathlib.Path | None
) -> Iterator[str]:
  """Yields lines that show examples, spread evenly over a dataset.

  Args:
    dataset: the examples; square images are drawn, not printed.
    count: number of examples to print.
    pictures: PNG file to draw square images into; None draws none.
  """
  side = math.isqrt(dataset.length)
  if dataset.tokenizer == "pixels" and side * side == dataset.length:
    if pictures is None:
      yield "images are drawn with --pictures=PATH"
    else:
      labels = draw(dataset, pictures)
      yield f"images in {pictures}, rows with labels {labels}"
    return
  count = min(count, len(dataset))
  for index in np.linspace(0, len(dataset) - 1, count, dtype=int).tolist():
    example = dataset[index]
    yield f"example {index}, label {example['label']}"
    for name in ("tokens", "tokens_2") if dataset.pair else ("tokens",):
      yield f"  {to_text(dataset, example[name])}"


def to_text(dataset: Dataset, ids: np.ndarray) -> str:
  """Returns the start of a sequence of ids as text."""
  ids = ids[:SHOWN]
  if dataset.tokenizer == "bytes":
    raw = (ids - dataset.id_shift).astype(np.uint8).tobytes()
    text = raw.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
  if dataset.tokenizer in ("full", "no_close") and ids.max() <= CLOSE:
    return decode(ids[: SHOWN // 3])
  return " ".join(map(str, ids[: SHOWN // 3].tolist()))


def draw(dataset: Dataset, path: pathlib.Path) -> list[int]:
  """Draws a row of images for each label; returns the labels, from the top."""
  # Imported here: only pictures need Pillow.
  from PIL import Image

  side = math.isqrt(dataset.length)
  scale = max(1, _SMALLEST // side)
  step = side * scale + _GAP
  labels = np.unique(dataset.labels).tolist()
  sheet = np.full((step * len(labels), step * COLUMNS), 128, np.uint8)
  for row, label in enumerate(labels):
    indices = np.flatnonzero(dataset.labels == label)[:COLUMNS]
    for column, index in enumerate(indices.tolist()):
      pixels = dataset[index]["tokens"].reshape(side, side)
      gray = pixels.astype(np.float32) * (255 / (dataset.vocab_size - 1))
      image = np.kron(gray.astype(np.uint8), np.ones((scale, scale), np.uint8))
      top, left = row * step, column * step
      sheet[top : top + step - _GAP, left : left + step - _GAP] = image
  Image.fromarray(sheet).save(path, format="PNG")
  return labels
