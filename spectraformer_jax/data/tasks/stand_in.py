"""Shared by the stand-ins for Long Range Arena: the files of packages.

A stand-in is other data of the same kind, under its own name. Facts and cache
key depend on the pinned checksum, not on the path of the file, so that a cached
task does not need the file.
"""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

from spectraformer_jax.data.packages import Package, locate
from spectraformer_jax.data.readers.reader import Example, TaskFiles

SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}


def package_files(
  task: str,
  package: Package,
  rows: Callable[[pathlib.Path, str], Iterator[Example]],
  parts: Mapping[str, int],
  *,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
) -> TaskFiles:
  """Describes the file of a package as the files of a task.

  Args:
    task: name of the task.
    package: the package of the data.
    rows: called as ``rows(path, part)``, where path is the package's file.
    parts: part to its approximate number of rows.
    data_dir: see :func:`locate`.
    cache_dir: see :func:`locate`.
  """
  if data_dir is not None:
    locate(task, package, data_dir)  # raises before anything is built
  return TaskFiles(
    folder=pathlib.Path(package.file),
    what=package.file,
    parts=parts,
    rows=lambda part: rows(locate(task, package, data_dir, cache_dir), part),
    checksum=package.sha256[:16],
    provenance="stand-in",
  )
