"""``fashion``: Fashion-MNIST, ten kinds of clothes; a stand-in for Image.

Pads the 28 x 28 gray images with two black pixels on each side: 1024 tokens,
the length of Long Range Arena's images. 62 % of the pixels are 0, as is the
padding of other tasks, so masks come from lengths. Dev is 10 % of the training
images, by content.

Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
Benchmarking Machine Learning Algorithms", 2017.
"""

import contextlib
import io
import os
import pathlib
import tarfile
from collections.abc import Iterator

from spectraformer_jax.data import find
from spectraformer_jax.data.packages import FASHION_MNIST, package_files
from spectraformer_jax.data.readers import idx, reader
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import Source

SIDE = 32
SIZES = {"train": 60_000, "test": 10_000}
NAMES = {"train": "train", "test": "t10k"}
KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")

ORIGIN = (
  "the files are at https://github.com/zalandoresearch/fashion-mnist, and "
  "Debian's dataset-fashion-mnist puts them into "
  "/usr/share/datasets/fashion-mnist"
)


@TASKS.register("fashion")
def fashion(
  *,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
) -> Source:
  """Returns the task, from Debian's package or from files of the user.

  Args:
    seed: seed of the split of the training images by content.
    data_dir: a folder with the four idx files or the package, or one up to
      three levels above it; None: the package that ``fetch`` downloaded.
    cache_dir: root of the token cache, with the downloaded package.

  Raises:
    ValueError: if the files are missing.
  """
  if data_dir is not None:
    found = reader.find_data("fashion", data_dir, origin=ORIGIN)
  else:
    found = package_files(
      "fashion", FASHION_MNIST, _package_examples, SIZES, cache_dir=cache_dir
    )
  return reader.make_source(
    found,
    reader.HOLDOUT,
    name="fashion",
    seed=seed,
    tokenizer="pixels",
    vocab_size=256,
    num_classes=10,
    length=SIDE * SIDE,
  )


@reader.reads(
  "fashion", files="{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]"
)
def find_idx(root: pathlib.Path) -> reader.TaskFiles | None:
  """Finds the folder of the four idx files."""
  for end in ("", ".gz"):
    folder = find.folder_with(root, f"{NAMES['train']}-{KINDS[0]}{end}")
    if folder is not None:
      break
  else:
    return None
  paths = {
    part: [folder / f"{name}-{kind}{end}" for kind in KINDS]
    for part, name in NAMES.items()
  }
  all_paths = [path for pair in paths.values() for path in pair]
  find.check_present(folder, all_paths)
  return reader.TaskFiles(
    folder=folder,
    layout="idx files",
    parts=SIZES,
    examples=lambda part: _file_examples(paths[part], part),
    checksum=find.checksum(all_paths, folder),
    provenance="stand-in",
  )


@reader.reads("fashion", files=FASHION_MNIST.file)
def find_package(root: pathlib.Path) -> reader.TaskFiles | None:
  """Finds the folder of the Debian package."""
  folder = find.folder_with(root, FASHION_MNIST.file)
  if folder is None:
    return None
  return package_files(
    "fashion", FASHION_MNIST, _package_examples, SIZES, data_dir=folder
  )


def _file_examples(
  paths: list[pathlib.Path], part: str
) -> Iterator[reader.Example]:
  """Yields the examples of a part from its files of images and labels."""
  images, labels = paths
  with find.open_plain(images) as first, find.open_plain(labels) as second:
    yield from idx.read_examples(first, second, SIDE, f"{images.parent} {part}")


def _package_examples(
  path: pathlib.Path, part: str
) -> Iterator[reader.Example]:
  """Yields the examples in the Debian package."""
  wanted = [f"{NAMES[part]}-{kind}.gz" for kind in KINDS]
  contents = {}
  with _open_deb(path) as archive:
    for member in archive:
      name = member.name.rpartition("/")[2]
      file = archive.extractfile(member) if member.isfile() else None
      if name in wanted and file:
        contents[name] = file.read()
  images, labels = (io.BytesIO(contents[name]) for name in wanted)
  yield from idx.read_examples(images, labels, SIDE, f"{path} {part}")


@contextlib.contextmanager
def _open_deb(path: pathlib.Path) -> Iterator[tarfile.TarFile]:
  """Opens the tar file of data in a Debian package, which is an ar archive."""
  with open(path, "rb") as file:
    file.read(len(b"!<arch>\n"))
    # A member has a header of 60 bytes, and starts at an even position.
    while header := file.read(60):
      size = int(header[48:58])
      if header.startswith(b"data.tar"):
        with tarfile.open(fileobj=io.BytesIO(file.read(size))) as archive:
          yield archive
        return
      file.seek(size + size % 2, io.SEEK_CUR)
  raise ValueError(f"{path} must be a Debian package with data.tar inside.")
