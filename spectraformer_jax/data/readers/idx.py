"""Reads the idx files of MNIST and its relatives: images and labels.

A file holds a header of big-endian numbers (a magic number, whose last byte is
the number of sizes, then the sizes), then one byte per pixel or label. It is
often gzipped. Source: https://yann.lecun.com/exdb/mnist.
"""

import gzip
import io
import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from spectraformer_jax.data.readers.reader import Example, check_label

IMAGES, LABELS = 0x0803, 0x0801

_READ_AT_ONCE = 1000


def read_examples(
  images: io.BufferedIOBase, labels: io.BufferedIOBase, side: int, where: str
) -> Iterator[Example]:
  """Yields square images, padded with black to `side` x `side`, with labels.

  Args:
    images: the open idx file of the images, gzipped or not.
    labels: the open idx file of the labels.
    side: width and height of the padded images.
    where: name of the files, for messages.

  Raises:
    ValueError: if a file is damaged or of another kind.
  """
  images, labels = _plain(images), _plain(labels)
  try:
    count, height, width = _sizes(images, IMAGES, f"{where} images")
    (number,) = _sizes(labels, LABELS, f"{where} labels")
    if number != count or not height == width <= side:
      raise ValueError(
        f"{where}: there must be one label per square image of at most {side} "
        f"x {side}, got {count} images of {height} x {width} and {number} "
        "labels."
      )
    edge = (side - height) // 2
    margins = ((0, 0), *[(edge, side - height - edge)] * 2)
    for start in range(0, count, _READ_AT_ONCE):
      size = min(_READ_AT_ONCE, count - start)
      shape = (size, height, width)
      pixels = np.pad(_read(images, shape, f"{where} images"), margins)
      of_chunk = _read(labels, (size,), f"{where} labels").tolist()
      for i, image in enumerate(pixels.reshape(size, -1)):
        name = f"{where} image {start + i}"
        yield Example(image, check_label(of_chunk[i], 10, name))
    # Reads past the end, which also makes gzip compare its checksum.
    for file, name in ((images, "images"), (labels, "labels")):
      if file.read(1):
        raise ValueError(
          f"{where} {name}: the file goes on after the {count} that its header "
          "announces; it is damaged."
        )
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f"{where}: a gzip file is damaged ({error}).") from error


def _plain(file: io.BufferedIOBase) -> io.BufferedIOBase:
  """Returns the file, unpacked if it is gzipped."""
  start = file.read(2)
  file.seek(0)
  return gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file


def _sizes(file: io.BufferedIOBase, magic: int, where: str) -> tuple[int, ...]:
  """Returns the sizes in the header; raises ValueError for another file."""
  found, *sizes = struct.unpack(
    f">{1 + magic % 256}I", _exactly(file, 4 + 4 * (magic % 256), where)
  )
  if found != magic:
    raise ValueError(
      f"{where}: an idx file of these starts with {magic:#010x}, got "
      f"{found:#010x}."
    )
  return tuple(sizes)


def _read(
  file: io.BufferedIOBase, shape: tuple[int, ...], where: str
) -> np.ndarray:
  """Returns the next bytes as an array of shape `shape`."""
  content = _exactly(file, math.prod(shape), where)
  return np.frombuffer(content, np.uint8).reshape(shape)


def _exactly(file: io.BufferedIOBase, size: int, where: str) -> bytes:
  """Reads `size` bytes; raises ValueError if the file has fewer."""
  content = file.read(size)
  if missing := size - len(content):
    raise ValueError(
      f"{where}: the file is cut off, {missing} bytes are missing."
    )
  return content
