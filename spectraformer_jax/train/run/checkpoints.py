"""Checkpoints: the last few and the best, safe against a kill at any moment.

The `CheckpointManager` of orbax manages them. A checkpoint counts once orbax
has committed it, and is used only if its content has the checksum that was
written. It holds one copy of the state as host arrays, which can be read with
any number of devices, and a JSON record of everything else a resume needs.
"""

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from spectraformer_jax.nn.pretrained import (
  VARIABLES_CHECKSUM,
  checksum,
  one_line,
  was_integer,
)
from spectraformer_jax.train.step.state import TrainState

# The folder, beside that of the checkpoints, for damaged checkpoints.
DAMAGED = "damaged_checkpoints"


class SaveError(OSError):
  """A checkpoint could not be written; earlier ones are unchanged."""


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
  """Keeps the last `keep` checkpoints and the best ones that they name."""

  keep: int
  best: Mapping[int, int | None]  # the best step, by step of the checkpoint

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Returns for each checkpoint whether it is kept."""
    del context
    newest = sorted(info.step for info in checkpoints)[-self.keep :]
    steps = {*newest, *(self.best.get(step) for step in newest)}
    return [info.step in steps for info in checkpoints]


class Checkpointer:
  """Saves and restores `TrainState` with a JSON record; a context manager.

  Saving is synchronous: a state of this library's size takes about 50 ms, and
  an error is raised in the step that saves. Of several processes, only process
  0 may have a `Checkpointer`.

  Args:
    directory: made if it does not exist; remains of an interrupted save are
      removed.
    keep: number of the last checkpoints that are kept, beside the best.
  """

  def __init__(self, directory: Path | str, *, keep: int) -> None:
    self._directory = Path(directory).absolute()
    self._best: dict[int, int | None] = {}
    self._directory.mkdir(parents=True, exist_ok=True)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_LastAndBest(keep, self._best),
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,
        create=False,  # orbax cannot create it with active_processes
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=0, active_processes={0}
        ),
      ),
    )

  def save(
    self, state: TrainState, record: Mapping[str, Any], *, best_step: int | None
  ) -> None:
    """Writes one checkpoint, then removes those no longer needed.

    Args:
      state: host arrays (`parallel.to_host`).
      record: JSON values.
      best_step: the best step so far, whose checkpoint is kept.

    Raises:
      SaveError: it could not be written, for instance to a full disk.
    """
    step = int(state.step)
    stored = {
      **record,
      "best_step": best_step,
      "checksum": _checksum(state, {**record, "best_step": best_step}),
      VARIABLES_CHECKSUM: checksum(state.variables),
    }
    self._best[step] = best_step
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_without_none(state)),
          record=ocp.args.JsonSave(stored),
        ),
        force=True,
      )
    except Exception as error:  # orbax and tensorstore raise many kinds
      for partial in self._directory.glob(f"{step}.*tmp*"):
        shutil.rmtree(partial, ignore_errors=True)
      self._manager.reload()
      raise SaveError(
        f"The checkpoint of step {step} could not be written to "
        f"{str(self._directory)!r}, which holds those of steps {self.steps()}. "
        f"Cause: {one_line(error)}"
      ) from error

  def steps(self) -> list[int]:
    """Returns the steps of all complete checkpoints, in order."""
    return sorted(self._manager.all_steps())

  def restore_latest(
    self, like: TrainState
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Reads the newest undamaged checkpoint; None if there is no checkpoint.

    Newer, damaged ones are moved to the folder `DAMAGED`, with a warning.

    Args:
      like: see `restore`.

    Raises:
      ValueError: no checkpoint can be read.
    """
    damaged = {}
    for step in reversed(self.steps()):
      try:
        restored = self.restore(step, like)
      except ValueError as error:
        damaged[step] = str(error)
        continue
      for bad_step, reason in damaged.items():
        place = self._set_aside(bad_step)
        logging.warning(
          "%s The checkpoint is now in %s; going on from step %d instead.",
          reason,
          place,
          step,
        )
      return restored
    if damaged:
      raise ValueError(
        f"None of the checkpoints {sorted(damaged)} can be read. "
        f"{damaged[max(damaged)]}"
      )
    return None

  def restore(
    self, step: int, like: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    """Reads the checkpoint of `step` into host arrays.

    Args:
      step: one of `steps()`.
      like: a state of the same shapes and dtypes, on any devices.

    Returns:
      The state and the record.

    Raises:
      ValueError: it is damaged, or has other shapes or dtypes than `like`.
    """
    target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    try:
      state, record = self._read(step, target)
      written = record.pop("checksum", None)  # older versions wrote none
      record.pop(VARIABLES_CHECKSUM, None)
      if written not in (None, _checksum(state, record)):
        # An earlier version may have stored integers, with another checksum.
        state, _ = self._read(step, self._as_written(step, target))
        if written != _checksum(state, record):
          raise ValueError("its content differs from what was written.")
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise ValueError(
        f"The checkpoint of step {step} in {str(self._directory)!r} cannot be "
        f"read: {one_line(error)}"
      ) from error
    self._best[step] = record.pop("best_step", None)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), state, like), record

  def _read(
    self, step: int, target: TrainState
  ) -> tuple[TrainState, dict[str, Any]]:
    """Reads the state, which must have the target's shapes and dtypes."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(_without_none(target)),
        record=ocp.args.JsonRestore(),
      ),
    )
    state = TrainState(**restored["state"])
    jax.tree_util.tree_map_with_path(_check_leaf, target, state)
    if int(state.step) != step:
      raise ValueError(f"it is that of step {int(state.step)}.")
    return state, dict(restored["record"])

  def _as_written(self, step: int, target: TrainState) -> TrainState:
    """Returns the target with integers where an earlier version stored them."""
    folder = self._directory / str(step) / "state"
    with ocp.StandardCheckpointer() as checkpointer:
      stored = checkpointer.metadata(folder).item_metadata.tree
    name_of = functools.partial(
      jax.tree_util.keystr, simple=True, separator="/"
    )
    dtypes = {
      name_of(path): leaf.dtype
      for path, leaf in jax.tree_util.tree_leaves_with_path(stored)
    }

    def as_stored(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
      dtype = dtypes.get(name_of(path), leaf.dtype)
      return leaf.astype(dtype) if was_integer(leaf.dtype, dtype) else leaf

    return jax.tree_util.tree_map_with_path(as_stored, target)

  def _set_aside(self, step: int) -> Path:
    """Moves a checkpoint to the folder `DAMAGED`; returns its new path."""
    folder = self._directory.with_name(DAMAGED)
    folder.mkdir(exist_ok=True)
    place = folder / str(step)
    for number in itertools.count(2):
      if not place.exists():
        break
      place = folder / f"{step}-{number}"
    shutil.move(self._directory / str(step), place)
    self._manager.reload()
    return place

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._manager.close()


def _without_none(state: TrainState) -> dict[str, Any]:
  """Returns the parts of the state that are not None."""
  return {k: v for k, v in state._asdict().items() if v is not None}


def _check_leaf(
  path: tuple[Any, ...], wanted: np.ndarray, found: np.ndarray
) -> None:
  """Refuses a leaf of another shape or dtype; orbax would accept it."""
  if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
    raise ValueError(
      f"checkpoint leaf {jax.tree_util.keystr(path)} is {found.dtype}"
      f"{found.shape}, the model needs {wanted.dtype}{wanted.shape}."
    )


def _checksum(state: TrainState, record: Mapping[str, Any]) -> str:
  """Returns a checksum of all arrays and of the record."""
  return checksum(state, json.dumps(record, sort_keys=True))
