"""Finds and opens files below a folder that a user names.

Files may be damaged or hostile: only plain files are opened (a pipe never
ends), and a file is read into memory up to a limit only.
"""

import codecs
import gzip
import hashlib
import io
import logging
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator

LOGGER = logging.getLogger("spectraformer_jax.data")

LEVELS = 3
"""Depth of a search: archives unpack to ``lra_release/lra_release``."""

MAX_LINE = 2**24  # bytes of a line, with its end
MAX_FILE = 2**24
"""Limit in bytes of a file read at once: a review, a picture, a description."""

# Folders that a search does not enter: they may hold thousands of files.
_LEAVES = {"imgs", "metadata", "neg", "pos", "unsup"}
_SHOWN = 8  # names in a message
_SAMPLE = 2**16  # bytes at each end of a file that are hashed


def open_root(data_dir: str | os.PathLike) -> pathlib.Path:
  """Returns the folder `data_dir`; raises ValueError if it is not one."""
  root = as_path("data_dir", data_dir)
  try:
    if root.is_file():
      kind = archive_kind(root)
      raise ValueError(_unpack(root, kind) if kind else _no_folder(root))
    if not root.is_dir():
      raise ValueError(_no_folder(root))
    with os.scandir(root):
      return root
  except OSError as error:
    raise ValueError(
      f"data_dir={str(data_dir)!r} cannot be read: {error.strerror}."
    ) from None


def as_path(name: str, value: str | os.PathLike) -> pathlib.Path:
  """Returns a path with its ``~`` expanded.

  Args:
    name: name of the argument, for messages.
    value: the argument.

  Raises:
    ValueError: if the argument is empty or is not a path.

  Example:
    >>> as_path("data_dir", "a/b").name
    'b'
  """
  try:
    # Refuses an empty path, which would be the current folder.
    text = os.fspath(value)
    if not text or "\0" in text:
      raise ValueError
    return pathlib.Path(text).expanduser()
  except (RuntimeError, TypeError, ValueError):
    raise ValueError(f"{name} must be a path, got {value!r}.") from None


def open_plain(path: pathlib.Path) -> io.BufferedReader:
  """Opens a file; raises ValueError for a folder, a pipe or a device."""
  if not path.is_file():
    fault = "is a folder, pipe or device" if path.exists() else "does not exist"
    raise ValueError(f"{path} must be a plain file, but it {fault}.")
  return open(path, "rb")


def read_plain(path: pathlib.Path, limit: int = MAX_FILE) -> bytes:
  """Reads a plain file; raises ValueError if it exceeds `limit` bytes."""
  with open_plain(path) as file:
    # `read(n)` allocates n bytes, so n is not `limit` for a small file. The
    # one byte more shows that a file is too large.
    size = os.fstat(file.fileno()).st_size
    content = file.read(min(size, limit) + 1)
  if len(content) > limit:
    raise ValueError(
      f"{path} must not be larger than {limit} bytes; it is another kind of "
      "file or damaged."
    )
  return content


def folders(root: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields `root` and the folders up to three levels below, breadth first."""
  level = [root]
  for depth in range(LEVELS + 1):
    yield from level
    if depth < LEVELS:
      level = [child for folder in level for child in _subfolders(folder)]


def innermost(
  root: pathlib.Path, wanted: Callable[[pathlib.Path], bool]
) -> pathlib.Path | None:
  """Returns the deepest folder that `wanted` accepts; logs the others."""
  hits = [folder for folder in folders(root) if wanted(folder)]
  hits.sort(key=lambda folder: (-len(folder.parts), folder))
  if len(hits) > 1:
    others = ", ".join(str(folder) for folder in hits[1:])
    LOGGER.warning(
      "several folders fit; reading the inner one, %s, not %s", hits[0], others
    )
  return hits[0] if hits else None


def folder_with(root: pathlib.Path, *names: str) -> pathlib.Path | None:
  """Returns the deepest folder with a file of one of the names."""
  return innermost(root, lambda f: any((f / name).is_file() for name in names))


def check_present(folder: pathlib.Path, paths: Iterable[pathlib.Path]) -> None:
  """Raises ValueError unless all `paths`, below `folder`, are files."""
  for path in paths:
    if not path.is_file():
      raise ValueError(f"{folder} must hold {path.name}, which is missing.")


def describe(root: pathlib.Path) -> str:
  """Describes the content of `root` for a message; says what to unpack."""
  entries = sorted(root.iterdir())
  names = [f"{p.name}/" if p.is_dir() else p.name for p in entries[:_SHOWN]]
  if len(entries) > _SHOWN:
    names.append(f"and {len(entries) - _SHOWN} more")
  text = f"it holds {', '.join(names) or 'nothing'}"
  for folder in (root, *_subfolders(root)):
    for path in _plain_files(folder)[:100]:
      kind = archive_kind(path)
      if kind:
        return f"{text}; {_unpack(path, kind)}"
  return text + "."


def archive_kind(path: pathlib.Path) -> str | None:
  """Returns the kind of an archive, found by content; None for another file.

  Example:
    >>> archive_kind(pathlib.Path(__file__)) is None
    True
  """
  with open_plain(path) as file:
    start = file.read(512)
  if start.startswith(b"PK\3\4"):
    return "zip"
  packed = start.startswith(b"\x1f\x8b")
  if packed:
    try:
      with gzip.open(path) as file:
        start = file.read(512)
    except (EOFError, OSError, zlib.error):
      return "gzip"
  if start[257:262] == b"ustar":
    return "tar"
  return "gzip" if packed else None


def checksum(paths: Iterable[pathlib.Path], root: pathlib.Path) -> str:
  """Returns a hash of 64 bits over the names, sizes and both ends of files.

  Of a large file it reads only the first and the last 64 KiB, so that opening a
  task stays fast.
  """
  digest = hashlib.sha256()
  for path in paths:
    name = os.fsencode(path.relative_to(root).as_posix())
    with open_plain(path) as file:
      size = os.fstat(file.fileno()).st_size
      digest.update(b"%b:%d:" % (name, size))
      digest.update(file.read(_SAMPLE))
      file.seek(max(0, size - _SAMPLE))
      digest.update(file.read(_SAMPLE))
  return digest.hexdigest()[:16]


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, at most 200 characters."""
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:200]


def read_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yields line numbers, from 1, and lines without their ends.

  A line ends in LF or CRLF; a byte order mark of UTF-8 at the start of the file
  is left out.
  """
  with open_plain(path) as file:
    number = 0
    while line := file.readline(MAX_LINE):
      number += 1
      if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
      if len(line) == MAX_LINE and not line.endswith(b"\n"):
        raise ValueError(
          f"{path} line {number}: lines must be shorter than {MAX_LINE} bytes."
        )
      yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folders in `folder` that a search enters, sorted."""
  if folder.name in _LEAVES:
    return []
  try:
    with os.scandir(folder) as entries:
      # For a link that leads to itself, `e.is_dir` raises an error, and
      # `os.path.isdir` returns False.
      names = [
        e.name
        for e in entries
        if e.name[0] != "."
        and (os.path.isdir(e.path) if e.is_symlink() else e.is_dir())
      ]
  except PermissionError:
    return []
  return [folder / name for name in sorted(names)]


def _plain_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the sorted files in a folder; none if it may hold thousands."""
  if folder.name in _LEAVES:
    return []
  return sorted(path for path in folder.iterdir() if path.is_file())


def _no_folder(root: pathlib.Path) -> str:
  """Returns the message about a `data_dir` that is not a folder."""
  return f"data_dir must be an existing folder, got {str(root)!r}."


def _unpack(path: pathlib.Path, kind: str) -> str:
  """Returns the message that asks the user to unpack an archive."""
  command = {"tar": "tar xf", "gzip": "gzip -dc", "zip": "unzip"}[kind]
  return (
    f"{path} is a {kind} file: unpack it ({command} {path}) and point data_dir "
    "at what comes out."
  )
