"""Checkpoints: the last few and the best, written so that a kill does no harm.

One orbax `CheckpointManager`. A checkpoint counts only once orbax has committed
it. It holds the un-replicated state as host arrays, so it can be read with any
number of devices, and a JSON record of everything else a resume needs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from spectraformer_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
  """Keeps the last `keep` checkpoints and those they name as the best."""

  keep: int

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any):
    """Which of `checkpoints` stay."""
    del context
    newest = sorted(checkpoints, key=lambda info: info.step)[-self.keep :]
    steps = {info.step for info in newest}
    steps |= {(info.metrics or {}).get("best_step") for info in newest}
    return [info.step in steps for info in checkpoints]


class Checkpointer:
  """Saves and restores `TrainState` with a JSON record; a context manager.

  Saving is synchronous: a state of this library's size takes about 50 ms, and
  a step that fails to save fails here and not later.

  Args:
    directory: made if it is not there; remains of an interrupted save go away.
    keep: how many of the last checkpoints stay, beside the best.
    read_only: for those who look at the checkpoints of a run that may be
      writing them: nothing in the directory is touched.
  """

  def __init__(
    self, directory: Path | str, *, keep: int, read_only: bool = False
  ):
    self._manager = ocp.CheckpointManager(
      Path(directory).absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_LastAndBest(keep),
        enable_async_checkpointing=False,
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
      ),
    )

  def save(
    self,
    state: TrainState,
    record: Mapping[str, Any],
    *,
    best_step: int | None,
  ) -> None:
    """Writes one checkpoint, then drops those no longer needed.

    Args:
      state: host arrays (`parallel.to_host`).
      record: JSON values.
      best_step: the best step so far, whose checkpoint must stay.
    """
    self._manager.save(
      int(state.step),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        record=ocp.args.JsonSave(dict(record)),
      ),
      metrics={"best_step": best_step},
      force=True,
    )

  def steps(self) -> list[int]:
    """Steps of all complete checkpoints, in order."""
    return sorted(self._manager.all_steps())

  def restore(
    self, step: int, like: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    """Reads the checkpoint of `step` into host arrays.

    Args:
      step: one of `steps()`.
      like: a tree of the same shapes and dtypes (arrays or structs); its
        devices do not matter.

    Returns:
      The state and the record.

    Raises:
      ValueError: the checkpoint holds other shapes or dtypes than `like`.
    """
    target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target._asdict()),
        record=ocp.args.JsonRestore(),
      ),
    )
    state = TrainState(**restored.state)
    jax.tree_util.tree_map_with_path(_check_leaf, target, state)
    return state, restored.record

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *exc_info: Any) -> None:
    self._manager.close()


def _check_leaf(path, wanted: np.ndarray, found: np.ndarray) -> None:
  """Orbax does not compare; a run must not go on from other arrays."""
  if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
    raise ValueError(
      f"checkpoint leaf {jax.tree_util.keystr(path)} is {found.dtype}"
      f"{found.shape}, the model needs {wanted.dtype}{wanted.shape}."
    )
