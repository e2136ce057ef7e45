"""Processes of one run: how they connect, and how process 0 shares its data.

Every process trains on its own rows. Process 0 alone uses the workdir: it reads
and writes the checkpoints, so the others need no access to its disk.
"""

import contextlib
import glob
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from spectraformer_jax.typing import PyTree

# Errors of JAX's collectives and coordination service, which fail when another
# process has gone, have messages like this.
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
  """Connects to the other processes of the run; call it before jax is used.

  Without arguments this is a run of one process, except on TPU machines, where
  JAX finds the processes of the pod itself. The environment variables
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are the defaults
  of the first three arguments.

  Args:
    coordinator: "host:port" of process 0; any free port.
    num_processes: number of processes of the run.
    process_id: number of this process, from 0 on.
    detect: whether to ask the cluster (Slurm, Open MPI, Kubernetes) for the
      first three arguments.
    heartbeat_seconds: a process that is silent for longer counts as gone.

  Raises:
    ValueError: one of the first three arguments is wrong, or missing while
      another is given.
  """
  given = {
    "coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
    "num_processes": _integer(num_processes, "JAX_NUM_PROCESSES"),
    "process_id": _integer(process_id, "JAX_PROCESS_ID"),
  }
  missing = [name for name, value in given.items() if value is None]
  if not missing:
    _check_address(**given)
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


def _check_address(
  coordinator: str, num_processes: int, process_id: int
) -> None:
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


def from_main(function: Callable[..., Any], *args: Any) -> Any:
  """Calls `function(*args)` in process 0; returns its value in all processes.

  Args:
    function: returns a JSON value. If it raises a ValueError, every process
      raises it, so that none waits for process 0.
    *args: of `function`.

  Example:
    >>> from_main(dict, [("step", 3)])
    {'step': 3}
  """
  if jax.process_count() == 1:
    return function(*args)
  return _broadcast_outcome(*_call_in_main(function, *args))


def arrays_from_main(
  function: Callable[[], tuple[PyTree, Any]], like: PyTree
) -> tuple[PyTree, Any]:
  """Calls `function` in process 0; returns its arrays in all, bit for bit.

  Args:
    function: returns a tree of host arrays, or None, and a JSON value. If it
      raises a ValueError, every process raises it.
    like: a tree of the same shapes and dtypes as the arrays.
  """
  if jax.process_count() == 1:
    return function()
  result, error = _call_in_main(function)
  arrays, value = result or (None, None)
  has_arrays, value = _broadcast_outcome([arrays is not None, value], error)
  return _broadcast_arrays(arrays, like) if has_arrays else None, value


@contextlib.contextmanager
def entered_by_main(context: AbstractContextManager[None]) -> Iterator[None]:
  """Enters `context` in process 0; raises its ValueError in every process."""
  with contextlib.ExitStack() as stack:
    from_main(stack.enter_context, context)
    yield


def _call_in_main(
  function: Callable[..., Any], *args: Any
) -> tuple[Any, ValueError | None]:
  """Calls `function` in process 0 alone; returns its value and ValueError."""
  if not is_main():
    return None, None
  try:
    return function(*args), None
  except ValueError as error:
    return None, error


def _broadcast_outcome(value: Any, error: ValueError | None) -> Any:
  """Returns process 0's JSON value, or raises its error, in every process."""
  message = json.dumps([value, error and str(error)]).encode()
  value, text = json.loads(_broadcast(message))
  if text is not None:
    raise error or ValueError(text)
  return value


def _broadcast_arrays(tree: PyTree, like: PyTree) -> PyTree:
  """Returns process 0's `tree`, of the shapes and dtypes of `like`."""
  leaves = jax.tree.leaves(tree) if is_main() else []
  content = _broadcast(b"".join(np.asarray(a).tobytes() for a in leaves))
  like_leaves, structure = jax.tree.flatten(like)
  arrays, start = [], 0
  for leaf in like_leaves:
    count = int(np.prod(leaf.shape, dtype=int))
    array = np.frombuffer(content, leaf.dtype, count, start)
    arrays.append(array.reshape(leaf.shape))
    start += array.nbytes
  return jax.tree.unflatten(structure, arrays)


def _broadcast(content: bytes) -> bytes:
  """Returns process 0's `content` in every process."""
  # JAX broadcasts with a sum, which turns -0.0 into 0.0: so floats are sent as
  # bytes.
  send = multihost_utils.broadcast_one_to_all
  size = int(send(np.int32(len(content))))
  array = np.zeros(size, np.uint8)
  if is_main():
    array = np.frombuffer(content, np.uint8)
  return np.asarray(send(array)).astype(np.uint8).tobytes()


def is_lost_process(error: Exception) -> bool:
  """Whether `error` says that another process of the run has ended."""
  return jax.process_count() > 1 and bool(_FROM_THE_RUNTIME.search(str(error)))
