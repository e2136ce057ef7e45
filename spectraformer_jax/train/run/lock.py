"""A lock that lets one run at a time use a workdir."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LOCK = ".lock"


def in_use(workdir: Path) -> bool:
  """Whether another process holds the lock of a workdir; creates no file."""
  try:
    with (workdir / LOCK).open() as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except FileNotFoundError:
    return False
  return False


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
  """Keeps other runs out of a workdir, on this machine and on others.

  The operating system holds the lock as long as this process lives, so killing
  the process releases the lock. The lock file is never removed: otherwise two
  runs could hold locks on two files of the same name.

  Args:
    workdir: made if it does not exist.

  Raises:
    ValueError: another run uses the workdir.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / LOCK).open("a+") as file:
    if not _acquire(file):
      file.seek(0)
      holder = file.read().strip() or "another run"
      raise ValueError(
        f"workdir {str(workdir)!r} is in use by {holder}; wait for it or use "
        "another --workdir."
      )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def _acquire(file: TextIO) -> bool:
  """Takes the lock if it is free; retries, as `in_use` holds it briefly."""
  for _ in range(5):
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      time.sleep(0.05)
      continue
    return True
  return False
