"""The checkpoints of a run of any number of processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectraformer_jax.train.devices import hosts, parallel
from spectraformer_jax.train.run.checkpoints import Checkpointer
from spectraformer_jax.train.step.state import TrainState

Restored = tuple[TrainState, dict[str, Any]]


class Storage:
  """Reads and writes checkpoints in process 0; all processes get what it reads.

  A context manager. Every process has to make the same calls.

  Args:
    directory: on the disk of process 0.
    keep: see `Checkpointer`.
  """

  _checkpointer: Checkpointer  # in process 0 alone

  def __init__(self, directory: Path, *, keep: int) -> None:
    if hosts.is_main():
      self._checkpointer = Checkpointer(directory, keep=keep)

  def save(
    self, state: TrainState, record: Mapping[str, Any], *, best_step: int | None
  ) -> None:
    """Saves a replicated state; for the arguments see `Checkpointer.save`."""
    if hosts.is_main():
      self._checkpointer.save(
        parallel.to_host(state), record, best_step=best_step
      )

  def restore_latest(self, like: TrainState) -> Restored | None:
    """Returns in every process what `Checkpointer.restore_latest` reads."""
    state, record = hosts.arrays_from_main(
      lambda: self._checkpointer.restore_latest(like) or (None, None), like
    )
    return None if record is None else (state, record)

  def restore(self, step: int, like: TrainState) -> Restored:
    """Returns in every process what `Checkpointer.restore` reads."""
    return hosts.arrays_from_main(
      lambda: self._checkpointer.restore(step, like), like
    )

  def __enter__(self) -> "Storage":
    return self

  def __exit__(self, *exc_info: object) -> None:
    if hosts.is_main():
      self._checkpointer.__exit__(*exc_info)
