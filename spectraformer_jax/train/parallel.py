"""Devices: the only file of the training code that names them.

Data parallelism with `jax.pmap` over all local devices. The state has no
leading device axis: it goes in with `in_axes=None` and comes out with
`out_axes=None`, replicated, so there is nothing to un-replicate and a
checkpoint is that of one device. Only batches are split.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spectraformer_jax.typing import PyTree

AXIS = "data"


def check_batch_size(name: str, batch_size: int) -> None:
  """Refuses a global batch that the devices cannot share equally.

  Raises:
    ValueError: `batch_size` is not a multiple of the number of devices.
  """
  devices = jax.device_count()
  if batch_size % devices:
    raise ValueError(
      f"{name} must be a multiple of the number of devices = {devices}, "
      f"got {batch_size}."
    )


def hosts() -> dict[str, int]:
  """Which process this is, and of how many: host, hosts."""
  return {"host": jax.process_index(), "hosts": jax.process_count()}


def device_kinds() -> list[str]:
  """Kinds of all devices, one entry each."""
  return [device.device_kind for device in jax.devices()]


def peak_device_bytes() -> int | None:
  """The most memory a local device has had in use; None if it cannot say."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) if peaks else None


def replicate(tree: PyTree) -> PyTree:
  """Copies arrays (host or device) to every local device."""
  mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def to_host(tree: PyTree) -> PyTree:
  """Numpy arrays with the values of a replicated tree."""
  return jax.tree.map(np.asarray, jax.device_get(tree))


class DataParallelStep:
  """`step(state, batch, *rest, axis_name=...)` on all local devices.

  Compiled ahead of time, once for each shape of batch.

  Args:
    step: pure; what it returns is the same on every replica.
    donate_state: whether the old state's buffers may be reused.

  Attributes:
    compile_seconds: time spent compiling so far.
  """

  def __init__(self, step: Callable[..., Any], *, donate_state: bool = False):
    self._step = functools.partial(step, axis_name=AXIS)
    self._donate = (0,) if donate_state else ()
    self._compiled: dict[Any, Callable[..., Any]] = {}
    self.compile_seconds = 0.0
    # Virtual CPU devices share one thread pool: collectives of two steps in
    # flight wait for each other for ever.
    self._one_at_a_time = (
      jax.default_backend() == "cpu" and jax.local_device_count() > 1
    )

  def __call__(
    self, state: PyTree, batch: Mapping[str, np.ndarray], *rest: Any
  ) -> Any:
    """Runs the step.

    Args:
      state: as `replicate` or this step returns it.
      batch: this host's arrays [B, ...]; B a multiple of its devices.
      *rest: what else `step` takes, the same for every replica.

    Returns:
      What `step` returns, replicated; not waited for.
    """
    batch = _split(batch)
    shapes = tuple(sorted((n, a.shape, a.dtype) for n, a in batch.items()))
    if shapes not in self._compiled:
      self._compiled[shapes] = self._compile(state, batch, *rest)
    result = self._compiled[shapes](state, batch, *rest)
    return jax.block_until_ready(result) if self._one_at_a_time else result

  def _compile(self, *args):
    start = time.perf_counter()
    mapped = jax.pmap(
      self._step,
      axis_name=AXIS,
      in_axes=(None, 0) + (None,) * (len(args) - 2),
      out_axes=None,
      donate_argnums=self._donate,
    )
    compiled = mapped.lower(*args).compile()
    self.compile_seconds += time.perf_counter() - start
    return compiled


def _split(batch):
  """[B, ...] -> [local devices, B / local devices, ...]."""
  devices = jax.local_device_count()
  return {
    name: array.reshape(devices, -1, *array.shape[1:])
    for name, array in batch.items()
  }


def on_one_device(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """Runs `function` under jit on one device and replicates its result.

  For what must be the same everywhere, such as a redraw: replicas are equal by
  construction, and work is not done once for each.
  """
  jitted = jax.jit(function)
  return lambda *args: replicate(jitted(*jax.tree.map(_one_copy, args)))


def _one_copy(leaf):
  """A replicated array's first copy; anything else as it is."""
  if isinstance(leaf, jax.Array):
    return leaf.addressable_shards[0].data
  return leaf
