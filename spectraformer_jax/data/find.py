"""Finding files under a folder that a user names, and saying what is there."""

import hashlib
import logging
import os
import pathlib
import tarfile
from collections.abc import Callable, Iterable, Iterator

LOGGER = logging.getLogger("spectraformer_jax.data")

LEVELS = 3
"""How deep a search goes: archives unpack to ``lra_release/lra_release``."""

MAX_LINE = 2**26

_LEAVES = {"imgs", "metadata", "neg", "pos", "unsup"}  # hold files by thousands
_SHOWN = 8
_SAMPLE = 2**16


def open_root(data_dir: str | os.PathLike) -> pathlib.Path:
  """The folder `data_dir`; ValueError if it is none, or an archive."""
  root = pathlib.Path(data_dir).expanduser()
  if root.is_file():
    kind = archive_kind(root)
    raise ValueError(_unpack(root, kind) if kind else _no_folder(root))
  if not root.is_dir():
    raise ValueError(_no_folder(root))
  return root


def folders(root: pathlib.Path) -> Iterator[pathlib.Path]:
  """`root` and the folders up to three levels below it, breadth first."""
  level = [root]
  for depth in range(LEVELS + 1):
    yield from level
    if depth < LEVELS:
      level = [child for folder in level for child in _subfolders(folder)]


def innermost(
  root: pathlib.Path, wanted: Callable[[pathlib.Path], bool]
) -> pathlib.Path | None:
  """The deepest folder that is wanted; a warning names the others."""
  hits = [folder for folder in folders(root) if wanted(folder)]
  hits.sort(key=lambda folder: (-len(folder.parts), folder))
  if len(hits) > 1:
    others = ", ".join(str(folder) for folder in hits[1:])
    LOGGER.warning(
      "several folders fit; reading the inner one, %s, not %s", hits[0], others
    )
  return hits[0] if hits else None


def describe(root: pathlib.Path) -> str:
  """What lies in `root`, for a message; names an archive still packed."""
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
  """The kind of an archive, by content, whatever its name; None if it is none.

  Example:
    >>> archive_kind(pathlib.Path(__file__)) is None
    True
  """
  with open(path, "rb") as file:
    start = file.read(512)
  if start.startswith(b"PK\3\4"):
    return "zip"
  if start.startswith(b"\x1f\x8b"):
    return "tar" if tarfile.is_tarfile(path) else "gzip"
  return "tar" if start[257:262] == b"ustar" else None


def checksum(paths: Iterable[pathlib.Path], root: pathlib.Path) -> str:
  """Identifies files: 64 bits over names, sizes and the ends of each.

  The middle of a large file is not read, so that opening it stays quick.
  """
  digest = hashlib.sha256()
  for path in paths:
    size = path.stat().st_size
    digest.update(f"{path.relative_to(root).as_posix()}:{size}:".encode())
    with open(path, "rb") as file:
      digest.update(file.read(_SAMPLE))
      file.seek(max(0, size - _SAMPLE))
      digest.update(file.read(_SAMPLE))
  return digest.hexdigest()[:16]


def read_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Line numbers from 1 and lines without their ends, one at a time."""
  with open(path, "rb") as file:
    number = 0
    while line := file.readline(MAX_LINE):
      number += 1
      if len(line) == MAX_LINE and not line.endswith(b"\n"):
        raise ValueError(
          f"{path} line {number}: lines must be shorter than {MAX_LINE} bytes."
        )
      yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
  """The folders in a folder that a search may enter, sorted."""
  if folder.name in _LEAVES:
    return []
  try:
    with os.scandir(folder) as entries:
      names = [e.name for e in entries if e.is_dir() and e.name[0] != "."]
  except PermissionError:
    return []
  return [folder / name for name in sorted(names)]


def _plain_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files in a folder, sorted; none of those that hold thousands."""
  if folder.name in _LEAVES:
    return []
  return sorted(path for path in folder.iterdir() if path.is_file())


def _no_folder(root: pathlib.Path) -> str:
  """The message about a `data_dir` that is no folder."""
  return f"data_dir must be an existing folder, got {str(root)!r}."


def _unpack(path: pathlib.Path, kind: str) -> str:
  """The message about an archive."""
  command = {"tar": "tar xf", "gzip": "gzip -dc", "zip": "unzip"}[kind]
  return (
    f"{path} is a {kind} file: unpack it ({command} {path}) and point data_dir "
    "at what comes out."
  )
