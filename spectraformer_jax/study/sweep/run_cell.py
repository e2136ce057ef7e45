"""Trains one cell in a process of its own: its memory, its crash."""

import logging as python_logging
import os
import signal
import sys
import threading
from pathlib import Path

from absl import logging

from spectraformer_jax.study.sweep.cells import CELL, cell_from_json

FAILED = 1


def stop_with_the_sweep() -> None:
  """Ends this process as SIGTERM does when the other end of stdin is gone.

  The sweep never writes to it, so however the sweep ends, a kill included, its
  cells save what they have and stop.
  """

  def watch():
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=watch, daemon=True).start()


def main(workdir: str, cpus: str) -> int:
  """Trains the cell that `workdir` describes.

  Args:
    workdir: holds the cell's description.
    cpus: numbers of the cores to stay on, comma-separated; empty for all.
  """
  # Before JAX counts the cores and starts as many threads.
  if cpus and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
  from spectraformer_jax.train.devices.host_memory import keep_freed_memory
  from spectraformer_jax.train.loop import train_and_evaluate

  keep_freed_memory()
  logging.set_verbosity(logging.INFO)
  # Checkpointing has much to say; of others only warnings.
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.levelno > python_logging.INFO
      or "spectraformer_jax" in Path(record.pathname).parts
    )
  )
  folder = Path(workdir)
  try:
    cell = cell_from_json((folder / CELL).read_text())
    command = cell.command(folder)
    result = train_and_evaluate(cell.config(), folder, command=command)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return FAILED
  if result.get("diverged"):
    print(f"error: {result['diverged']}", file=sys.stderr)
    return FAILED
  return 0


if __name__ == "__main__":
  stop_with_the_sweep()
  sys.exit(main(*sys.argv[1:]))
