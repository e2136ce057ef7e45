"""Data parallelism over all devices of all hosts.

One of two engines runs the same pure step on every device: `jax.pmap`, or
`jax.jit` of a `shard_map` over a `Mesh`. Only batches are split. The state has
no device axis: every device holds all of it, and a checkpoint holds one copy.
Sharding parameters or optimiser would gain nothing at this library's sizes
(below a million numbers). No other file of the training code handles devices.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spectraformer_jax.typing import PyTree

Batch = Mapping[str, np.ndarray]
Devices = Sequence[jax.Device]

AXIS = "data"
ENGINES = ("pmap", "jit")

# By default XLA runs each operation of a CPU program as early as possible and
# keeps its result, even a buffer that a much later loop fills. That takes 1.5
# times the memory of the schedule below, and the same time.
_COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
  "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
}


def check_batch_size(name: str, batch_size: int, parts: int = 1) -> None:
  """Refuses a global batch that the devices cannot share equally.

  Args:
    name: of the batch size, for the message.
    batch_size: of all devices together.
    parts: number of parts into which each device divides its share.

  Raises:
    ValueError: `batch_size` is not a multiple of the number of devices times
      `parts`.
  """
  devices = jax.device_count()
  if batch_size % (devices * parts):
    times = f" times config.train.accumulate = {parts}" if parts > 1 else ""
    raise ValueError(
      f"{name} must be a multiple of the number of devices = {devices}{times}, "
      f"got {batch_size}."
    )


def host_index_and_count() -> dict[str, int]:
  """Returns "host", this process's index, and "hosts", how many there are."""
  return {"host": jax.process_index(), "hosts": jax.process_count()}


def compiler_options() -> dict[str, str | bool]:
  """Returns XLA's options for a training step on the default backend.

  Example:
    >>> step = jax.jit(lambda x: x + 1, compiler_options=compiler_options())
    >>> int(step(1))
    2
  """
  return _COMPILER_OPTIONS.get(jax.default_backend(), {})


def device_kinds() -> list[str]:
  """Returns the kind of each device."""
  return [device.device_kind for device in jax.devices()]


def peak_device_bytes() -> int | None:
  """Returns the largest memory used on a local device; None if unknown."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks) if peaks else None


def _mesh(devices: Devices | None = None) -> Mesh:
  return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def replicate(tree: PyTree) -> PyTree:
  """Copies arrays, equal on all hosts, to every device."""
  sharding = NamedSharding(_mesh(), PartitionSpec())
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  def put(leaf: Any) -> Any:
    # To devices of other hosts JAX copies only host arrays; it checks that they
    # are equal on all hosts.
    is_array = isinstance(leaf, jax.Array)
    if is_array and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
    return jax.device_put(np.asarray(leaf), sharding)

  return jax.tree.map(put, tree)


def to_host(tree: PyTree) -> PyTree:
  """Returns a replicated tree as NumPy arrays."""
  return jax.tree.map(np.asarray, jax.device_get(tree))


def map_step(
  step: Callable[..., Any],
  num_args: int,
  *,
  engine: str,
  devices: Devices | None = None,
  donate_state: bool = False,
) -> jax.stages.Wrapped:
  """Maps `step(state, batch, *rest, axis_name=...)` over devices.

  Args:
    step: pure; returns the same on every replica.
    num_args: number of the step's arguments, state and batch included.
    engine: "pmap" takes batches [devices, B / devices, ...], "jit" [B, ...].
    devices: None for all.
    donate_state: whether the old state's buffers may be reused.

  Returns:
    A function that can be called and lowered, not compiled yet.
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
  # Without check_vma=False shard_map sums the gradient of replicated parameters
  # itself; the step's own sum would multiply it by the number of devices.
  mapped = jax.shard_map(
    step,
    mesh=_mesh(devices),
    in_specs=(everywhere, split) + (everywhere,) * (num_args - 2),
    out_specs=everywhere,
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=donate)


class DataParallelStep:
  """Runs `step(state, batch, *rest, axis_name=...)` on all devices.

  The step is compiled once for each shape of batch, by `compile` or else by the
  first call.

  Args:
    step: pure; returns the same on every replica.
    engine: one of `ENGINES`.
    donate_state: whether the old state's buffers may be reused.

  Attributes:
    compile_seconds: time of compiling so far.
  """

  def __init__(
    self,
    step: Callable[..., Any],
    *,
    engine: str = "pmap",
    donate_state: bool = False,
  ) -> None:
    self._step = step
    self._engine = engine
    self._donate_state = donate_state
    self._compiled: dict[Any, Callable[..., Any]] = {}
    self.compile_seconds = 0.0
    # Virtual CPU devices share one thread pool, in which the collectives of two
    # concurrent steps would wait for each other for ever.
    self._one_at_a_time = (
      jax.default_backend() == "cpu" and jax.local_device_count() > 1
    )

  def __call__(
    self, state: PyTree, batch: Mapping[str, np.ndarray], *rest: Any
  ) -> Any:
    """Runs the step.

    Args:
      state: as `replicate` or this step returns it.
      batch: this host's arrays [B, ...]; B is a multiple of the number of its
        devices.
      *rest: the step's other arguments, the same for every replica.

    Returns:
      The step's replicated results, which need not be computed yet.
    """
    batch = self._divide(batch)
    compiled = self._find(state, batch, *rest)
    result = compiled(state, self._place(batch), *rest)
    return jax.block_until_ready(result) if self._one_at_a_time else result

  def compile(
    self, state: PyTree, batch: Mapping[str, np.ndarray], *rest: Any
  ) -> None:
    """Compiles for batches of this shape, unless that has been done."""
    self._find(state, self._divide(batch), *rest)

  def memory_plan(self) -> dict[str, int] | None:
    """Returns the bytes that the last compiled program needs on each device.

    Returns:
      "arguments" (the state and one batch), "temporary" and "total"; None if
      nothing was compiled or the compiler gives no sizes.
    """
    compiled = next(reversed(self._compiled.values()), None)
    analysis = getattr(compiled, "memory_analysis", lambda: None)()
    if analysis is None:
      return None
    arguments = analysis.argument_size_in_bytes
    temporary = analysis.temp_size_in_bytes
    # The new state shares the memory of a donated one.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
      "arguments": arguments,
      "temporary": temporary,
      "total": arguments + temporary + results,
    }

  def _divide(self, batch: Batch) -> dict[str, Any]:
    """Returns the batch in the form that the engine lowers."""
    return _split(batch) if self._engine == "pmap" else _shard(batch)

  def _place(self, batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the divided batch in the form that the compiled program takes."""
    if self._engine == "pmap" and jax.process_count() > 1:
      # A call of jax.pmap makes global arrays of the hosts' parts; its program
      # compiled ahead of time does not.
      return _shard(batch)
    return batch

  def _find(
    self, state: PyTree, batch: dict[str, Any], *rest: Any
  ) -> Callable[..., Any]:
    """Returns the program for divided batches of this shape."""
    shapes = tuple(sorted((n, a.shape, a.dtype) for n, a in batch.items()))
    if shapes not in self._compiled:
      start = time.perf_counter()
      self._compiled[shapes] = self._compile(state, batch, *rest)
      self.compile_seconds += time.perf_counter() - start
    return self._compiled[shapes]

  def _compile(self, *args: Any) -> Callable[..., Any]:
    mapped = map_step(
      self._step,
      len(args),
      engine=self._engine,
      # With several processes, the devices must have the order in which
      # `_shard` divides a batch; with one, pmap chooses the order.
      devices=jax.devices() if jax.process_count() > 1 else None,
      donate_state=self._donate_state,
    )
    return mapped.lower(*args).compile(compiler_options())


def _split(batch: Batch) -> dict[str, np.ndarray]:
  """Reshapes [B, ...] to [local devices, B / local devices, ...]."""
  devices = jax.local_device_count()
  return {
    name: array.reshape(devices, -1, *array.shape[1:])
    for name, array in batch.items()
  }


def _shard(batch: Batch) -> dict[str, jax.Array]:
  """Makes global arrays, split over all devices, of this host's rows."""
  sharding = NamedSharding(_mesh(), PartitionSpec(AXIS))
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in batch.items()
  }


def on_one_device(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """Returns a function that runs on one device and replicates its result.

  A redraw uses it: replicas are then equal by construction, and the projection
  is drawn once, not once for each replica.
  """
  jitted = jax.jit(function)
  return lambda *args: replicate(jitted(*jax.tree.map(_one_copy, args)))


def _one_copy(leaf: Any) -> Any:
  """Returns the first copy of a replicated array; other leaves as they are."""
  if isinstance(leaf, jax.Array):
    return leaf.addressable_shards[0].data
  return leaf
