"""One run at a time in a workdir."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"


def in_use(workdir: Path) -> bool:
  """Whether another process holds the lock of a workdir; makes nothing."""
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
  """Keeps other runs out of a workdir, on this and on other machines.

  The operating system holds the lock for as long as this process lives, so
  nothing is left behind by a kill. The file stays: removing it would let two
  runs hold locks on two files of the same name.

  Args:
    workdir: made if it is not there.

  Raises:
    ValueError: another run is at work in it.
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


def _acquire(file) -> bool:
  """Takes the lock; waits a moment for `in_use`, which holds it to look."""
  for _ in range(5):
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      time.sleep(0.05)
      continue
    return True
  return False
