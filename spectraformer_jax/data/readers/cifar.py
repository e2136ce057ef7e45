"""Reads CIFAR-10 batches, binary or pickled by Python, as gray images.

The binary form (``data_batch_{1..5}.bin``, ``test_batch.bin``; records of one
label byte and 3072 colour bytes) is preferred if both exist. Long Range Arena's
validation set is the last 10 % of the training images in the order of
TensorFlow Datasets. That order comes from a hash of keys that the batches lack,
so here the split is by content.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images",
2009.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from spectraformer_jax.data import find
from spectraformer_jax.data.formats import pickles
from spectraformer_jax.data.formats.grayscale import rgb_to_gray
from spectraformer_jax.data.readers import reader

BATCHES = {
  "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
  "test": ("test_batch",),
}
SIZES = {"train": 50_000, "test": 10_000}
PLANE = 32 * 32  # bytes of one colour of an image
RECORD = 1 + 3 * PLANE  # a label and an image

MAX_BYTES = 2**26  # a pickled batch takes 31 MB

_READ_AT_ONCE = 1000


@reader.reads(
  "image", files="cifar-10-batches-bin/*.bin or cifar-10-batches-py/*"
)
def find_cifar(root: pathlib.Path) -> reader.TaskFiles | None:
  """Finds the folder of the batches."""
  forms = (
    (".bin", "CIFAR-10 binary batches", _binary_examples),
    ("", "CIFAR-10 Python batches", _python_examples),
  )
  return next(filter(None, (_find(root, *form) for form in forms)), None)


def _find(
  root: pathlib.Path,
  suffix: str,
  layout: str,
  read: Callable[[pathlib.Path], Iterator[reader.Example]],
) -> reader.TaskFiles | None:
  """Finds the folder of the batches in one form."""
  names = {p: [n + suffix for n in ns] for p, ns in BATCHES.items()}
  folder = find.folder_with(root, names["test"][0])
  if folder is None:
    return None
  paths = {p: [folder / name for name in ns] for p, ns in names.items()}
  everything = [path for part in paths.values() for path in part]
  find.check_present(folder, everything)
  return reader.TaskFiles(
    folder=folder,
    layout=layout,
    parts=SIZES,
    examples=lambda part: itertools.chain.from_iterable(map(read, paths[part])),
    checksum=find.checksum(everything, folder),
    mark="-hash_split",
  )


def _binary_examples(path: pathlib.Path) -> Iterator[reader.Example]:
  """Yields the images of a binary batch."""
  size = path.stat().st_size
  if not size or size % RECORD:
    raise ValueError(
      f"{path} must be a CIFAR-10 batch of {RECORD} bytes per image, got "
      f"{size} bytes; take cifar-10-binary.tar.gz, whole."
    )
  first = 0
  with find.open_plain(path) as file:
    while block := file.read(RECORD * _READ_AT_ONCE):
      records = np.frombuffer(block, np.uint8).reshape(-1, RECORD)
      yield from _examples(records[:, 1:], records[:, 0].tolist(), path, first)
      first += len(records)


def _python_examples(path: pathlib.Path) -> Iterator[reader.Example]:
  """Yields the images of a pickled batch."""
  batch = pickles.load(path, MAX_BYTES)
  columns = {
    key.decode("latin-1") if isinstance(key, bytes) else str(key): value
    for key, value in (batch.items() if isinstance(batch, dict) else ())
  }
  images, labels = columns.get("data"), columns.get("labels")
  if (
    not isinstance(images, np.ndarray)
    or images.dtype != np.uint8
    or images.shape[1:] != (3 * PLANE,)
    or not isinstance(labels, list)
    or len(labels) != len(images)
  ):
    found = [name[:20] for name in sorted(columns)[:6]]
    raise ValueError(
      f"{path} must hold 'data', uint8 of shape (images, {3 * PLANE}), and as "
      f"many 'labels'; found keys {found}."
    )
  for first in range(0, len(images), _READ_AT_ONCE):
    block = slice(first, first + _READ_AT_ONCE)
    yield from _examples(images[block], labels[block], path, first)


def _examples(
  images: np.ndarray, labels: Sequence[Any], path: pathlib.Path, first: int
) -> Iterator[reader.Example]:
  """Yields colour images ``[count, 3072]`` as gray ones, with labels.

  In messages, the images are numbered from `first` on.
  """
  gray = rgb_to_gray(*np.moveaxis(images.reshape(-1, 3, PLANE), 1, 0))
  for i, pixels in enumerate(gray):
    label = reader.check_label(labels[i], 10, f"{path} image {first + i}")
    yield reader.Example(pixels, label)
