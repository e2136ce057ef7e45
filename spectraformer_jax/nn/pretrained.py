"""A trained model from the folder of its run, without the training code."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.nn import from_config
from spectraformer_jax.typing import PyTree

# What a workdir holds; docs/training.md.
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
# In the record of a checkpoint: of the variables that `load_pretrained` gives.
VARIABLES_CHECKSUM = "variables_checksum"


class Pretrained(NamedTuple):
  """A model and its variables.

  Attributes:
    model: a Linen module.
    variables: its collections: "params" (their moving average, if the run kept
      one), "random_features" and perhaps "feature_stats"; host arrays.
  """

  model: nn.Module
  variables: dict[str, PyTree]


def load_pretrained(
  path: Path | str, *, step: int | str = "best"
) -> Pretrained:
  """The model of a run, with the variables it is evaluated with.

  The optimiser's state is not looked at, and neither the data nor the devices
  of the run are needed.

  Args:
    path: the run's workdir: its config.json and checkpoints/.
    step: "best" (by dev accuracy), "last", or the number of a checkpoint.

  Returns:
    Model and variables; `model.apply(variables, tokens, length)` gives logits.

  Raises:
    ValueError: the folder holds no run or no such checkpoint, or the checkpoint
      is damaged or of another model.

  Example:
    >>> load_pretrained("no/such/folder")
    Traceback (most recent call last):
      ...
    ValueError: 'no/such/folder' is no workdir: no config.json.
  """
  path = Path(path)
  if not (path / CONFIG).exists():
    raise ValueError(f"{str(path)!r} is no workdir: no {CONFIG}.")
  stored = json.loads((path / CONFIG).read_text())
  config = ConfigDict(stored["config"])
  feature_map = from_config.make_feature_map(config)
  model = from_config.make_model(config, feature_map, stored["data"]["train"])
  step = find_step(path, step)
  try:
    variables = _read(path, step, _shapes(model, feature_map))
  except Exception as error:  # orbax and tensorstore raise many kinds
    raise ValueError(
      f"The checkpoint of step {step} in {str(path)!r} cannot be read: "
      f"{one_line(error)}"
    ) from error
  return Pretrained(model, variables)


def find_step(path: Path, step: int | str) -> int:
  """The number of a checkpoint.

  Args:
    path: a workdir.
    step: "best", "last" or a number.

  Raises:
    ValueError: there is none of that step.
  """
  folder = path / CHECKPOINTS
  # Orbax gives a checkpoint its name when it is complete.
  names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
  steps = sorted(int(name) for name in names if name.isdigit())
  if not steps:
    raise ValueError(f"{str(path)!r} holds no checkpoint.")
  wanted = steps[-1] if step == "last" else step
  if step == "best":
    best = _read_record(path, steps[-1])["best"]
    if best is None:
      raise ValueError(
        f"{str(path)!r} was not evaluated yet, so no step is the best; use "
        "'last'."
      )
    wanted = best["step"]
  if str(wanted) not in map(str, steps):
    raise ValueError(
      f"{str(path)!r} holds no checkpoint of step {step!r}; it holds best and "
      f"last, {', '.join(map(str, steps))}."
    )
  return int(wanted)


def checksum(tree: PyTree, note: str = "") -> str:
  """Of every bit of some arrays, and of a text that belongs to them.

  Example:
    >>> checksum([np.ones(2)]) == checksum([np.zeros(2)])
    False
  """
  digest = hashlib.sha256(note.encode())
  for leaf in map(np.asarray, jax.tree.leaves(tree)):
    digest.update(f"{leaf.dtype}{leaf.shape}".encode())
    digest.update(np.ascontiguousarray(leaf).view(np.uint8))
  return digest.hexdigest()


def one_line(error: Exception) -> str:
  """The message in at most 300 characters."""
  text = " ".join(str(error).split()) or repr(error)
  return text if len(text) <= 300 else text[:297] + "..."


def _read_record(path: Path, step: int) -> dict[str, Any]:
  """What a checkpoint holds beside arrays."""
  # Here, because it takes a second to import.
  import orbax.checkpoint as ocp

  folder = (path / CHECKPOINTS / str(step) / "record").absolute()
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder)


def _read(path: Path, step: int, like: dict[str, PyTree]) -> dict[str, PyTree]:
  """Arrays in the structure of `like`; ValueError if they are others."""
  import orbax.checkpoint as ocp

  folder = (path / CHECKPOINTS / str(step) / "state").absolute()
  with ocp.StandardCheckpointer() as checkpointer:
    state = checkpointer.restore(folder)
  params = state.get("ema", state["params"])
  # Orbax knows no named tuples: what it gives is told by names alone.
  found = _by_name({"params": params, **state["collections"]})
  wanted = _by_name(like)
  shape = lambda leaf: (leaf.shape, np.dtype(leaf.dtype))
  for name in sorted(wanted.keys() | found.keys()):
    pair = [shape(x[name]) if name in x else None for x in (wanted, found)]
    if pair[0] != pair[1]:
      raise ValueError(f"{name} is {pair[1]}, the model needs {pair[0]}.")
  leaves = [np.asarray(found[name]) for name in wanted]
  variables = jax.tree.unflatten(jax.tree.structure(like), leaves)
  written = _read_record(path, step).get(VARIABLES_CHECKSUM)
  if written not in (None, checksum(variables)):  # older versions wrote none
    raise ValueError("its content differs from what was written.")
  return variables


def _by_name(tree: PyTree) -> dict[str, Any]:
  """Leaves by path, in order."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _shapes(
  model: nn.Module, feature_map: FeatureMap | None
) -> dict[str, PyTree]:
  """Variables of the model, or structs like them."""
  rngs = {"params": jax.random.key(0), "features": jax.random.key(0)}
  inputs = from_config.example_inputs(model)
  if feature_map is None or feature_map.weight_matrix.info.redrawable:
    return jax.eval_shape(model.init, rngs, *inputs)
  return model.init(rngs, *inputs)  # cannot be drawn while tracing
