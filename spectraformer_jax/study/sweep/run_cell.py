"""Trains one cell in a process of its own, so a crash ends no other cell."""

import os
import signal
import sys
import threading
from pathlib import Path

from absl import logging

from spectraformer_jax.study.sweep.cells import CELL, cell_from_json

FAILED = 1


def stop_with_the_sweep() -> None:
  """Sends SIGTERM to this process once the other end of stdin closes.

  The sweep holds the other end and never writes. So its cells save their state
  and stop however the sweep ends, even if it is killed.
  """

  def watch() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=watch, daemon=True).start()


def main(workdir: str, cpus: str) -> int:
  """Trains the cell that `workdir` describes; returns an exit status.

  Args:
    workdir: holds the cell's description.
    cpus: numbers of the cores to stay on, comma-separated; empty for all.
  """
  # Before the import of JAX, which starts as many threads as it finds cores.
  if cpus and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
  from spectraformer_jax.train.devices.host_memory import keep_freed_memory
  from spectraformer_jax.train.loop import train_and_evaluate
  from spectraformer_jax.train.run.progress import quiet_other_packages

  keep_freed_memory()
  logging.set_verbosity(logging.INFO)
  quiet_other_packages()
  folder = Path(workdir)
  try:
    cell = cell_from_json((folder / CELL).read_text())
    command = cell.command(folder)
    result = train_and_evaluate(cell.config(), folder, command=command)
    if result.get("diverged"):
      raise ValueError(result["diverged"])
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return FAILED
  return 0


if __name__ == "__main__":
  stop_with_the_sweep()
  sys.exit(main(*sys.argv[1:]))
