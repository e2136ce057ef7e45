"""Devices: the only file of the training code that names them.

Data parallelism over all devices of all hosts, by one of two engines that run
the same pure step: `jax.pmap`, or `jax.jit` of a `shard_map` over a `Mesh`.
The state has no device axis: every device holds all of it, and a checkpoint is
that of one device. Only batches are split. Sharding parameters or optimiser
would gain nothing at this library's sizes (below a million numbers).
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spectraformer_jax.typing import PyTree

AXIS = "data"
ENGINES = ("pmap", "jit")

# XLA's own order of a CPU program runs what it can as early as it can, and
# keeps the results, even buffers that are only to be written in a loop much
# later: half as much memory again as in this order, in the same time.
_COMPILER_OPTIONS = {
  "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
}


def check_batch_size(name: str, batch_size: int, parts: int = 1) -> None:
  """Refuses a global batch that the devices cannot share equally.

  Raises:
    ValueError: `batch_size` is not a multiple of the number of devices times
      `parts`, into which each divides its share.
  """
  devices = jax.device_count()
  if batch_size % (devices * parts):
    times = f" times config.train.accumulate = {parts}" if parts > 1 else ""
    raise ValueError(
      f"{name} must be a multiple of the number of devices = {devices}{times}, "
      f"got {batch_size}."
    )


def hosts() -> dict[str, int]:
  """Which process this is, and of how many: host, hosts."""
  return {"host": jax.process_index(), "hosts": jax.process_count()}


def compiler_options() -> dict[str, str]:
  """What the compiler of the devices in use is told, for a training step.

  Example:
    >>> step = jax.jit(lambda x: x + 1, compiler_options=compiler_options())
    >>> int(step(1))
    2
  """
  return _COMPILER_OPTIONS.get(jax.default_backend(), {})


def device_kinds() -> list[str]:
  """Kinds of all devices, one entry each."""
  return [device.device_kind for device in jax.devices()]


def peak_device_bytes() -> int | None:
  """The most memory a local device has had in use; None if it cannot say."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) if peaks else None


def _mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def replicate(tree: PyTree) -> PyTree:
  """Copies arrays (host or device), equal on all hosts, to every device."""
  sharding = NamedSharding(_mesh(), PartitionSpec())
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  def put(leaf):
    # Only host arrays can go to other hosts' devices; JAX compares them.
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
    return jax.device_put(np.asarray(leaf), sharding)

  return jax.tree.map(put, tree)


def to_host(tree: PyTree) -> PyTree:
  """Numpy arrays with the values of a replicated tree."""
  return jax.tree.map(np.asarray, jax.device_get(tree))


def map_step(
  step: Callable[..., Any],
  num_args: int,
  *,
  engine: str,
  devices: Sequence[jax.Device] | None = None,
  donate_state: bool = False,
) -> Callable[..., Any]:
  """`step(state, batch, *rest, axis_name=...)` on many devices, not compiled.

  Args:
    step: pure; what it returns is the same on every replica.
    num_args: of `step`, state and batch included.
    engine: "pmap" takes batches [devices, B / devices, ...], "jit" [B, ...].
    devices: None for all there are.
    donate_state: whether the old state's buffers may be reused.

  Returns:
    A function that can be called and lowered.
  """
  step = functools.partial(step, axis_name=AXIS)
  donate = (0,) if donate_state else ()
  if engine == "pmap":
    return jax.pmap(
      step,
      axis_name=AXIS,
      in_axes=(None, 0) + (None,) * (num_args - 2),
      out_axes=None,
      devices=devices,
      donate_argnums=donate,
    )
  everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
  # Without check_vma=False the gradient of replicated parameters would come
  # already summed, and the step's own sum would multiply it by the devices.
  mapped = jax.shard_map(
    step,
    mesh=_mesh(devices),
    in_specs=(everywhere, split) + (everywhere,) * (num_args - 2),
    out_specs=everywhere,
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=donate)


class DataParallelStep:
  """`step(state, batch, *rest, axis_name=...)` on all devices.

  Compiled ahead of time, once for each shape of batch, by `compile` or else by
  the first call.

  Args:
    step: pure; what it returns is the same on every replica.
    engine: one of `ENGINES`.
    donate_state: whether the old state's buffers may be reused.

  Attributes:
    compile_seconds: time spent compiling so far.
  """

  def __init__(
    self,
    step: Callable[..., Any],
    *,
    engine: str = "pmap",
    donate_state: bool = False,
  ):
    self._step = step
    self._engine = engine
    self._donate_state = donate_state
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
    batch = self._divide(batch)
    compiled = self._find(state, batch, *rest)
    result = compiled(state, self._place(batch), *rest)
    return jax.block_until_ready(result) if self._one_at_a_time else result

  def compile(
    self, state: PyTree, batch: Mapping[str, np.ndarray], *rest: Any
  ) -> None:
    """Compiles for batches of this shape, if that was not done yet."""
    self._find(state, self._divide(batch), *rest)

  def memory_plan(self) -> dict[str, int] | None:
    """Bytes that the last compiled program plans with on each device.

    Returns:
      "arguments" (the state and one batch), "temporary" and "total"; None if
      nothing was compiled, or the compiler does not say.
    """
    compiled = next(reversed(self._compiled.values()), None)
    analysis = getattr(compiled, "memory_analysis", lambda: None)()
    if analysis is None:
      return None
    arguments, temporary = (
      analysis.argument_size_in_bytes,
      analysis.temp_size_in_bytes,
    )
    # A donated state and the new one share their memory.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
      "arguments": arguments,
      "temporary": temporary,
      "total": arguments + temporary + results,
    }

  def _divide(self, batch):
    """The batch as the engine lowers it."""
    return _split(batch) if self._engine == "pmap" else _shard(batch)

  def _place(self, batch):
    """The divided batch as the compiled program takes it."""
    if self._engine == "pmap" and jax.process_count() > 1:
      # A pmap makes global arrays of the hosts' parts, a compiled one does not.
      return _shard(batch)
    return batch

  def _find(self, state, batch, *rest):
    """The program for divided batches of this shape."""
    shapes = _shapes(batch)
    if shapes not in self._compiled:
      start = time.perf_counter()
      self._compiled[shapes] = self._compile(state, batch, *rest)
      self.compile_seconds += time.perf_counter() - start
    return self._compiled[shapes]

  def _compile(self, *args):
    mapped = map_step(
      self._step,
      len(args),
      engine=self._engine,
      # Of several processes in the order of `_mesh`; of one in pmap's own.
      devices=jax.devices() if jax.process_count() > 1 else None,
      donate_state=self._donate_state,
    )
    return mapped.lower(*args).compile(compiler_options())


def _shapes(batch):
  return tuple(sorted((n, a.shape, a.dtype) for n, a in batch.items()))


def _split(batch):
  """[B, ...] -> [local devices, B / local devices, ...]."""
  devices = jax.local_device_count()
  return {
    name: array.reshape(devices, -1, *array.shape[1:])
    for name, array in batch.items()
  }


def _shard(batch):
  """This host's part of axis 0 -> global arrays, split over all devices."""
  sharding = NamedSharding(_mesh(), PartitionSpec(AXIS))
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
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
