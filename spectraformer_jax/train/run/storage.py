"""The checkpoints of a run of any number of processes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spectraformer_jax.train.devices import hosts, parallel
from spectraformer_jax.train.run.checkpoints import Checkpointer
from spectraformer_jax.train.step.state import TrainState

Restored = tuple[TrainState, dict[str, Any]]


class Storage:
  """Process 0 reads and writes; all processes get what it has read.

  A context manager. Every process has to make the same calls.

  Args:
    directory: of process 0's disk.
    keep: see `Checkpointer`.
  """

  def __init__(self, directory: Path, *, keep: int):
    self._checkpointer = None
    if hosts.is_main():
      self._checkpointer = Checkpointer(directory, keep=keep)

  def save(
    self,
    state: TrainState,
    record: Mapping[str, Any],
    *,
    best_step: int | None,
  ) -> None:
    """See `Checkpointer.save`; takes a replicated state."""
    if self._checkpointer:
      self._checkpointer.save(
        parallel.to_host(state), record, best_step=best_step
      )

  def restore_latest(self, like: TrainState) -> Restored | None:
    """See `Checkpointer.restore_latest`."""
    return _share(lambda: self._checkpointer.restore_latest(like), like)

  def restore(self, step: int, like: TrainState) -> Restored:
    """See `Checkpointer.restore`."""
    return _share(lambda: self._checkpointer.restore(step, like), like)

  def __enter__(self) -> "Storage":
    return self

  def __exit__(self, *exc_info: Any) -> None:
    if self._checkpointer:
      self._checkpointer.__exit__(*exc_info)


def _share(
  restore: Callable[[], Restored | None], like: TrainState
) -> Restored | None:
  """What process 0 restores, for everyone."""
  state = None

  def read():
    nonlocal state
    restored = restore()
    if restored is None:
      return None
    state, record = restored
    return record

  record = hosts.from_main(read)
  if record is None:
    return None
  return hosts.arrays_from_main(state, like), record
