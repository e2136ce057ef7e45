"""What the stand-ins for Long Range Arena share: a package becomes a task.

A stand-in is other data of the same kind, under a name of its own. Facts and
cache depend on the pinned checksum and not on where the file lies, so that a
task that is in the cache can do without it.
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
  """A task whose rows come out of a package.

  Args:
    task: its name.
    package: where its data are.
    rows: called as ``rows(path, part)`` with the file of the package.
    plan: as for :func:`make_source`.
    parts: part to about how many rows it has.
    data_dir: see :func:`locate`.
    cache_dir: see :func:`locate`.
    **facts: more for :func:`make_source`: ``name``, ``seed``, ``length``, ...
  """
  if data_dir is not None:
    locate(task, package, data_dir)  # a mistake shows before anything is built
  found = TaskFiles(
    folder=pathlib.Path(package.file),
    what=package.file,
    parts=parts,
    rows=lambda part: rows(locate(task, package, data_dir, cache_dir), part),
    checksum=package.sha256[:16],
    provenance="stand-in",
  )
  return make_source(found, plan, **facts)
