"""Makes a task of a package: shared by the stand-ins for Long Range Arena.

A stand-in is other data of the same kind, under its own name. Facts and cache
key depend on the pinned checksum, not on the path of the file, so that a cached
task does not need the file.
"""

import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from spectraformer_jax.data.packages import Package, locate
from spectraformer_jax.data.readers.reader import (
  Example,
  Plan,
  TaskFiles,
  make_source,
)
from spectraformer_jax.data.source import Source

SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}


def from_package(
  task: str,
  package: Package,
  rows: Callable[[pathlib.Path, str], Iterator[Example]],
  plan: Plan,
  parts: dict[str, int],
  *,
  data_dir: str | os.PathLike | None,
  cache_dir: str | os.PathLike | None,
  **facts: Any,
) -> Source:
  """Returns the task whose rows come out of a package.

  Args:
    task: name of the task.
    package: the package of the data.
    rows: called as ``rows(path, part)``, where path is the package's file.
    plan: see :func:`make_source`.
    parts: part to its approximate number of rows.
    data_dir: see :func:`locate`.
    cache_dir: see :func:`locate`.
    **facts: arguments of :func:`make_source`: ``name``, ``seed``, ...
  """
  if data_dir is not None:
    locate(task, package, data_dir)  # raises before anything is built
  found = TaskFiles(
    folder=pathlib.Path(package.file),
    what=package.file,
    parts=parts,
    rows=lambda part: rows(locate(task, package, data_dir, cache_dir), part),
    checksum=package.sha256[:16],
    provenance="stand-in",
  )
  return make_source(found, plan, **facts)
