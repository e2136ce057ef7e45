"""Processes of one run: how they find each other, and what process 0 tells.

Every process trains on its own rows. Process 0 alone touches the workdir: it
reads and writes the checkpoints, so the others need no access to its disk.
"""

import glob
import importlib.util
import json
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from spectraformer_jax.typing import PyTree

# How collectives and the coordination service begin their messages.
_FROM_THE_RUNTIME = re.compile(
  r"Gloo|^(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN):"
)


def connect(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  detect: bool = False,
  heartbeat_seconds: int = 100,
) -> None:
  """Joins the other processes of the run; before anything else uses jax.

  Without arguments this is a run of one process, except on TPU machines, whose
  pods JAX knows. The environment variables JAX_COORDINATOR_ADDRESS,
  JAX_NUM_PROCESSES and JAX_PROCESS_ID stand in for the arguments.

  Args:
    coordinator: "host:port" of process 0, any free port.
    num_processes: how many there are.
    process_id: which of them this is, from 0 on.
    detect: ask the cluster (Slurm, Open MPI, Kubernetes) for all three.
    heartbeat_seconds: without a sign of life a process counts as gone.

  Raises:
    ValueError: some of the three are given and others are not, or one is not
      what it should be.
  """
  given = {
    "coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "num_processes": _integer(num_processes, "JAX_NUM_PROCESSES"),
    "process_id": _integer(process_id, "JAX_PROCESS_ID"),
  }
  missing = [name for name, value in given.items() if value is None]
  if not missing:
    _check(**given)
    jax.distributed.initialize(
      *given.values(),
      heartbeat_timeout_seconds=heartbeat_seconds,
      cluster_detection_method="deactivate",
    )
  elif len(missing) < len(given):
    raise ValueError(
      f"--coordinator, --num_processes and --process_id go together, got no "
      f"{' and no '.join(missing)}."
    )
  elif detect or _is_tpu_machine():
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)


def _integer(value: int | None, variable: str) -> int | None:
  text = os.environ.get(variable)
  if value is not None or text is None:
    return value
  if not text.isdigit():
    raise ValueError(f"${variable} must be an integer, got {text!r}.")
  return int(text)


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
  if not re.fullmatch(r".+:\d+", coordinator):
    raise ValueError(f"--coordinator must be host:port, got {coordinator!r}.")
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"--process_id must be from 0 to num_processes - 1 = "
      f"{num_processes - 1}, got {process_id}."
    )


def _is_tpu_machine() -> bool:
  devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(devices) and importlib.util.find_spec("libtpu") is not None


def is_main() -> bool:
  """Whether this is process 0."""
  return jax.process_index() == 0


def from_main(function: Callable[[], Any]) -> Any:
  """Calls `function` in process 0; its JSON value or ValueError is everyone's.

  Example:
    >>> from_main(lambda: {"step": 3})
    {'step': 3}
  """
  if jax.process_count() == 1:
    return function()
  message, error = b"", None
  if is_main():
    try:
      message = json.dumps({"value": function()}).encode()
    except ValueError as caught:
      error = caught
      message = json.dumps({"error": str(caught)}).encode()
  answer = json.loads(_broadcast(message))
  if error is not None:
    raise error
  if "error" in answer:
    raise ValueError(answer["error"])
  return answer["value"]


def arrays_from_main(tree: PyTree | None, like: PyTree) -> PyTree:
  """Process 0's host arrays, bit for bit.

  Args:
    tree: of process 0; the others' is not looked at.
    like: a tree of the same shapes and dtypes.
  """
  if jax.process_count() == 1:
    return tree
  leaves = jax.tree.leaves(tree) if is_main() else []
  content = _broadcast(b"".join(np.asarray(a).tobytes() for a in leaves))
  shapes, structure = jax.tree.flatten(like)
  arrays, start = [], 0
  for leaf in shapes:
    count = int(np.prod(leaf.shape, dtype=int))
    array = np.frombuffer(content, leaf.dtype, count, start)
    arrays.append(array.reshape(leaf.shape))
    start += array.nbytes
  return jax.tree.unflatten(structure, arrays)


def _broadcast(content: bytes) -> bytes:
  """Process 0's content."""
  # As bytes, since the sum behind a broadcast makes 0.0 of -0.0.
  send = multihost_utils.broadcast_one_to_all
  size = int(send(np.int32(len(content))))
  array = np.zeros(size, np.uint8)
  if is_main():
    array = np.frombuffer(content, np.uint8)
  return np.asarray(send(array)).astype(np.uint8).tobytes()


def lost(error: Exception) -> bool:
  """Whether `error` is what a process gets when another one has gone."""
  return jax.process_count() > 1 and bool(_FROM_THE_RUNTIME.search(str(error)))
