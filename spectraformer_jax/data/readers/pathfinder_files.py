"""Reads Pathfinder images of Long Range Arena: PNG files and lists of labels.

``pathfinder<side>/curv_contour_length_14/imgs/<batch>/sample_<i>.png`` and
``metadata/<batch>.npy``. Despite their name, the lists of the release are text:
one line per image, with folder, file, number, label and parameters of the
generator, separated by spaces. A new run of the generator writes arrays of
strings; both are read. The archive holds two folders ``pathfinder128``; the one
in the inner ``lra_release`` is read.

Source: Linsley et al., "Learning long-range spatial dependencies with
horizontal gated recurrent units", 2018; Kim et al., "Disentangling neural
mechanisms for perceptual grouping", 2020.
"""

import functools
import io
import pathlib
import struct
import sys
from collections.abc import Iterator

import numpy as np

from spectraformer_jax.data import find
from spectraformer_jax.data.formats.npy import open_array
from spectraformer_jax.data.readers import reader

DIFFICULTY = "curv_contour_length_14"
SIZES = {"all": 200_000}
MAX_EMPTY = 10  # image files without content; the release has one
MAX_LISTED = 200_000
"""Limit of a list's images; all lists of the release name as many together."""

_MAX_LINE = 4096  # bytes; lines of the release have about 100
_MAX_NAME = 255  # characters of the folder and file of an image

_FILES = f"pathfinder{{}}/{DIFFICULTY}/{{{{imgs,metadata}}}}"
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def _find(root: pathlib.Path, side: int) -> reader.TaskFiles | None:
  """Finds the innermost ``pathfinder<side>`` with LRA's difficulty."""
  name = f"pathfinder{side}"
  # `root` may be the wanted folder, or the difficulty in it.
  resolved = root.resolve()
  if resolved.name == DIFFICULTY and resolved.parent.name == name:
    root = resolved.parent
  elif resolved.name == name:
    root = resolved
  top = find.innermost(
    root, lambda f: f.name == name and (f / DIFFICULTY / "metadata").is_dir()
  )
  if top is None:
    _explain_difficulty(root, name)
    return None
  folder = top / DIFFICULTY
  lists = _sorted_lists(folder)
  # The checksum covers all lists, but only two of the many pictures.
  images = [next(_read_list(path))[0] for path in (lists[0], lists[-1])]
  pictures = [folder / image for image in images if (folder / image).is_file()]
  return reader.TaskFiles(
    folder=folder,
    layout=f"Pathfinder files {side} x {side}",
    parts=SIZES,
    examples=lambda part: _examples(folder, lists, side),
    checksum=find.checksum([*lists, *pictures], folder),
    mark="-hash_split",
  )


for _task, _side in (("pathfinder", 32), ("pathx", 128)):
  reader.reads(_task, files=_FILES.format(_side))(
    functools.partial(_find, side=_side)
  )


def _explain_difficulty(root: pathlib.Path, name: str) -> None:
  """Raises ValueError if the folder has only images of other difficulties."""
  for folder in find.folders(root):
    prepared = any(folder.glob("*/dataset_info.json"))  # tfds_folder reads it
    if folder.name == name and not prepared:
      others = sorted(p.name for p in folder.iterdir() if p.is_dir())
      raise ValueError(
        f"{folder} must hold {DIFFICULTY}/metadata, the difficulty that Long "
        f"Range Arena uses; it holds {', '.join(others) or 'no folder'}."
      )


def _sorted_lists(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the lists, sorted by number of the batch."""
  paths = [p for p in (folder / "metadata").glob("*.npy") if p.name[0] != "."]
  if not paths:
    raise ValueError(f"{folder}/metadata must hold <batch>.npy, found none.")
  return sorted(paths, key=lambda path: _number(path.stem))


def _number(text: str) -> tuple[int, str]:
  """Returns a key that sorts names by the number that their digits form."""
  digits = "".join(c for c in text if c.isdecimal())
  return int(digits or 0), text


def _read_list(path: pathlib.Path) -> Iterator[tuple[str, int]]:
  """Yields path and label of each image of a list, sorted by file number."""
  with find.open_plain(path) as file:
    is_array = file.read(6) == b"\x93NUMPY"
  table = []
  for number, columns in _array_rows(path) if is_array else _text_rows(path):
    where = f"{path} line {number}"
    if len(columns) < 4:
      raise ValueError(
        f"{where}: expected folder, file, number, label and more with spaces "
        f"between them, got {len(columns)} columns."
      )
    name = f"{columns[0]}/{columns[1]}"
    if len(name) > _MAX_NAME or not (name.isascii() and name.isprintable()):
      raise ValueError(
        f"{where}: expected the folder and the name of a picture, got "
        f"{name[:40]!r}."
      )
    picture = pathlib.PurePosixPath(columns[0], columns[1])
    if picture.is_absolute() or ".." in picture.parts:
      raise ValueError(
        f"{where}: pictures must lie below the folder, got {str(picture)!r}."
      )
    table.append((picture, reader.check_label(columns[3], 2, where)))
    if len(table) > MAX_LISTED:
      raise ValueError(f"{path} must list at most {MAX_LISTED} images.")
  if not table:
    raise ValueError(f"{path} must list at least one image, it is empty.")
  for picture, label in sorted(table, key=lambda row: _number(row[0].name)):
    yield str(picture), label


def _text_rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
  """Yields the lines of a list that is text, as in the release."""
  for number, line in find.read_lines(path):
    if len(line) > _MAX_LINE:
      raise ValueError(
        f"{path} line {number}: lines must have at most {_MAX_LINE} bytes, got "
        f"{len(line)}; it is no list of pictures."
      )
    if line.strip():
      yield number, line.decode("utf-8", "replace").split()


def _array_rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
  """Yields the rows of a list that is an array of strings."""
  table = open_array(path, "array of strings")
  if (
    table.ndim != 2
    or table.dtype.kind not in "US"
    or table[:1].nbytes > _MAX_LINE
  ):
    raise ValueError(
      f"{path} must be an array of strings [images, columns], got "
      f"{table.dtype} {table.shape}."
    )
  for number, row in enumerate(table, start=1):
    try:
      row = np.ascontiguousarray(row.astype(str))
      # A numpy string may hold numbers that are not characters; such a string
      # fails later.
      is_text = row.view(np.uint32).max() <= sys.maxunicode
    except ValueError:
      is_text = False
    if not is_text:
      raise ValueError(f"{path} row {number}: it is no text.")
    yield number, row.tolist()


def _examples(
  folder: pathlib.Path, lists: list[pathlib.Path], side: int
) -> Iterator[reader.Example]:
  """Yields pixels and label of each image; counts and skips empty files."""
  empty = []
  for path in lists:
    for name, label in _read_list(path):
      picture = folder / name
      if not picture.exists():
        raise ValueError(
          f"{picture} is missing, though {path.name} lists it; unpack the "
          "archive again."
        )
      content = find.read_plain(picture)
      if content:
        yield reader.Example(_pixels(content, picture, side), label)
        continue
      empty.append(name)
      if len(empty) > MAX_EMPTY:
        raise ValueError(
          f"{folder} must not hold more than {MAX_EMPTY} empty pictures "
          f"(the release has one), found {', '.join(empty[:3])} and more."
        )
  if empty:
    find.LOGGER.warning(
      "%s: left out %d empty picture(s): %s",
      folder,
      len(empty),
      ", ".join(empty),
    )


def _pixels(content: bytes, picture: pathlib.Path, side: int) -> np.ndarray:
  """Returns the pixels of an 8-bit gray PNG, row by row."""
  # Imported here: only building the cache needs Pillow.
  from PIL import Image

  # Checked before unpacking, which could take much memory.
  header = content[len(_PNG_START) : len(_PNG_START) + 10]
  expected = struct.pack(">IIBB", side, side, 8, 0)
  if not content.startswith(_PNG_START) or header != expected:
    raise ValueError(f"{picture} must be a {side} x {side} PNG in 8-bit gray.")
  try:
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
      if image.size != (side, side) or image.mode != "L":
        raise ValueError(f"it is {image.mode} {image.size}")
      return np.asarray(image, np.uint8).ravel()
  # Pillow raises nearly anything.
  except Exception as error:
    raise ValueError(
      f"{picture} is damaged ({find.first_line(error)})."
    ) from None
