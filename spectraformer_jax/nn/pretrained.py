"""Loads a trained model from its run's folder, without the training code."""

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn import from_config
from spectraformer_jax.typing import PyTree

_LOGGER = logging.getLogger(__name__)

# Names inside a workdir; see docs/training.md.
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
# Under this key, a checkpoint's record holds the checksum of the variables that
# `load_pretrained` returns.
VARIABLES_CHECKSUM = "variables_checksum"


class Pretrained(NamedTuple):
  """A model and its variables.

  Attributes:
    model: a Linen module.
    variables: the collections of the model, as NumPy arrays: "params" (their
      moving average, if the run kept one) and, if the model has them,
      "random_features" and "feature_stats".
  """

  model: from_config.Model
  variables: dict[str, PyTree]


def load_pretrained(
  path: Path | str, *, step: int | str = "best"
) -> Pretrained:
  """Loads the model of a run, with the variables that it is evaluated with.

  It needs neither the data nor the devices of the run.

  Args:
    path: the run's workdir: its config.json and checkpoints/.
    step: "best" (by dev accuracy), "last", or the number of a checkpoint.

  Returns:
    Model and variables; `model.apply(variables, tokens, length)` returns
    logits.

  Raises:
    ValueError: the folder holds no run or no such checkpoint, or the checkpoint
      is damaged or belongs to another model.

  Example:
    >>> load_pretrained("no/such/folder")
    Traceback (most recent call last):
      ...
    ValueError: 'no/such/folder' is no workdir: no config.json.
  """
  path = Path(path)
  stored = read_config(path, ("config", "data"))
  if stored is None:
    raise ValueError(f"{str(path)!r} is no workdir: no {CONFIG}.")
  try:
    config = ConfigDict(stored["config"])
    feature_map = from_config.make_feature_map(config)
    model = from_config.make_model(config, feature_map, stored["data"]["train"])
    like = variables_or_shapes(model, feature_map)
  except Exception as error:  # an edited value may lead to any error
    raise damaged(path, error) from error
  step = find_step(path, step)
  try:
    variables = _read_variables(path, step, like)
  except Exception as error:  # orbax and tensorstore raise many kinds
    raise ValueError(
      f"The checkpoint of step {step} in {str(path)!r} cannot be read: "
      f"{one_line(error)}"
    ) from error
  return Pretrained(model, variables)


def read_config(workdir: Path, parts: Sequence[str]) -> dict[str, Any] | None:
  """Reads config.json.

  Args:
    workdir: a folder.
    parts: keys that the file must have.

  Returns:
    Its content; None without the file.

  Raises:
    ValueError: the file is damaged.
  """
  try:
    content = (workdir / CONFIG).read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None
  if not content.strip():
    raise damaged(workdir, "it is empty")
  try:
    stored = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise damaged(workdir, error) from error
  if not isinstance(stored, dict):
    raise damaged(workdir, f"it holds {type(stored).__name__}, not an object")
  for part in parts:
    content = stored.get(part)
    # "environments" is a list of objects; every other part is one object.
    if not isinstance(content, list if part == "environments" else dict):
      raise damaged(workdir, f"its {part!r} is missing or wrong")
    if part == "config":
      continue
    entries = content.values() if isinstance(content, dict) else content
    if not content or not all(isinstance(entry, dict) for entry in entries):
      raise damaged(workdir, f"its {part!r} holds no objects")
  return stored


def damaged(workdir: Path, why: Exception | str) -> ValueError:
  """Returns the error for a config.json that is not as the run wrote it."""
  if isinstance(why, Exception):
    why = one_line(why)
  return ValueError(
    f"{str(workdir / CONFIG)!r} is damaged: {why.rstrip('.')}; put back the "
    "file that the run wrote, or use another workdir."
  )


def find_step(path: Path, step: int | str) -> int:
  """Returns the number of a checkpoint: the step at which it was written.

  "last" is the newest checkpoint with a readable record, as when a run is
  resumed; that record says which step is the best. Newer checkpoints, whose
  records cannot be read, are ignored with a warning.

  Args:
    path: a workdir.
    step: "best", "last" or a number.

  Raises:
    ValueError: no such checkpoint, or none with a readable record.
  """
  folder = path / CHECKPOINTS
  # Orbax renames a checkpoint to its number when it is complete.
  names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  steps = sorted(int(x) for x in names if x.isascii() and x.isdigit())
  if not steps:
    raise ValueError(f"{str(path)!r} holds no checkpoint.")
  number = step
  if step in ("best", "last"):
    number, record = _newest(path, steps)
    if step == "best" and record["best"] is None:
      raise ValueError(
        f"{str(path)!r} was not evaluated yet, so no step is the best; use "
        "'last'."
      )
    if step == "best":
      number = record["best"]["step"]
  if str(number) not in map(str, steps):
    raise ValueError(
      f"{str(path)!r} holds no checkpoint of step {number!r}, but those of "
      f"steps {steps}; 'best' and 'last' choose one of these."
    )
  return int(number)


def _newest(path: Path, steps: Sequence[int]) -> tuple[int, dict[str, Any]]:
  """Returns the step of the newest readable record, and that record."""
  faults = {}
  for step in reversed(steps):
    try:
      record = _read_record(path, step)
      best = record["best"]
      if best is not None and not isinstance(best["step"], int):
        raise ValueError(f"its best step is {best['step']!r}")
    except Exception as error:  # orbax raises many kinds
      faults[step] = one_line(error)
      continue
    for bad_step, fault in faults.items():
      _LOGGER.warning(
        "The checkpoint of step %d in %r cannot be read: %s. Using that of "
        "step %d instead.",
        bad_step,
        str(path),
        fault,
        step,
      )
    return step, record
  raise ValueError(
    f"None of the checkpoints {list(steps)} in {str(path)!r} can be read: "
    f"{faults[steps[-1]]}"
  )


def checksum(tree: PyTree, note: str = "") -> str:
  """Returns a checksum of a note and of every bit of the arrays of `tree`.

  Example:
    >>> checksum([np.ones(2)]) == checksum([np.zeros(2)])
    False
  """
  digest = hashlib.sha256(note.encode())
  for leaf in map(np.asarray, jax.tree.leaves(tree)):
    digest.update(f"{leaf.dtype}{leaf.shape}".encode())
    digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
  return digest.hexdigest()


def one_line(error: Exception) -> str:
  """Returns an error's message in one line of at most 300 characters."""
  text = " ".join(str(error).split()) or repr(error)
  return text if len(text) <= 300 else text[:297] + "..."


def _read_record(path: Path, step: int) -> dict[str, Any]:
  """Reads what a checkpoint holds besides its arrays."""
  # Imported here because it takes a second.
  import orbax.checkpoint as ocp

  folder = (path / CHECKPOINTS / str(step) / "record").absolute()
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder)


def _read_variables(
  path: Path, step: int, like: dict[str, PyTree]
) -> dict[str, PyTree]:
  """Reads variables with the structure, shapes and dtypes of `like`.

  Raises:
    ValueError: the checkpoint holds other variables, or is damaged.
  """
  import orbax.checkpoint as ocp

  folder = (path / CHECKPOINTS / str(step) / "state").absolute()
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(folder)
  if int(state["step"]) != step:
    raise ValueError(f"it is that of step {int(state['step'])}.")
  params = state.get("ema", state["params"])
  # Orbax returns no named tuples, so leaves are matched by name.
  stored = _by_name({"params": params, **state["collections"]})
  wanted = _by_name(like)
  for name in sorted(wanted.keys() | stored.keys()):
    have, need = (
      (x[name].shape, np.dtype(x[name].dtype)) if name in x else None
      for x in (stored, wanted)
    )
    if have != need and not (
      have and need and have[0] == need[0] and was_integer(need[1], have[1])
    ):
      raise ValueError(f"{name} is {have}, the model needs {need}.")
  leaves = [np.asarray(stored[name]) for name in wanted]
  variables = jax.tree.unflatten(jax.tree.structure(like), leaves)
  written = _read_record(path, step).get(VARIABLES_CHECKSUM)
  if written not in (None, checksum(variables)):  # older versions wrote none
    raise ValueError("its content differs from what was written.")
  return jax.tree.map(lambda x, new: x.astype(new.dtype), variables, like)


def was_integer(wanted: np.dtype, stored: np.dtype) -> bool:
  """Whether an earlier version stored, as integers, what is float32 now.

  Earlier versions did so for bits, indices and permutations in projections. All
  of these are below 2**24, where float32 is exact.
  """
  return wanted == np.float32 and np.issubdtype(stored, np.integer)


def _by_name(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves of a tree by their paths, in the tree's order."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def variables_or_shapes(
  model: nn.Module, feature_map: FeatureMap | None
) -> dict[str, PyTree]:
  """Returns the model's variables, or only their shapes and dtypes."""
  rngs = {"params": jax.random.key(0), "features": jax.random.key(0)}
  inputs = from_config.example_inputs(model)
  init = functools.partial(model.init, rngs, *inputs)
  if feature_map is None or feature_map.weight_matrix.info.redrawable:
    return dict(jax.eval_shape(init))
  return dict(init())  # other matrices cannot be drawn while tracing
