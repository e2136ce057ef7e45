"""The start of a run from what another one has learnt."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from spectraformer_jax.nn import load_pretrained
from spectraformer_jax.train.config import flatten, to_dict
from spectraformer_jax.train.devices import hosts
from spectraformer_jax.train.run import run_folder
from spectraformer_jax.train.run.writers import read_rows, result_row
from spectraformer_jax.train.step import state
from spectraformer_jax.train.step.optim import FEATURE_MAP
from spectraformer_jax.typing import PyTree

# What is taken over. The rest of a model belongs to what it is asked.
SHARED = ("token_embedding", "position_embedding", "encoder")

# Keys of the sections model and feature_map that may differ.
_FREE = (
  *("model.init_from", "model.pooling", "model.pooled_norm"),
  *("model.dropout_rate", "model.vocab_size", "model.max_len"),
  "feature_map.redraw_interval",
)

# Keys that differ with another attention.
_OF_ATTENTION = ("model.attention", "model.attention_kwargs")
# The collection of projections.
_DRAWN = "random_features"

Variables = Mapping[str, PyTree]


def start_from(
  train_state: state.TrainState, config: ConfigDict
) -> tuple[state.TrainState, list[str]]:
  """The first state of a run, with the weights of `config.model.init_from`.

  Embeddings, positions and encoder come from the best-dev parameters of that
  run, and so do its projections and running statistics, to which the weights
  belong. Heads, pooling and optimiser start anew.

  A run with another `model.attention`, such as the exact one, gives all
  parameters whose names and shapes are those of this model, its head included
  where the objective is the same. What belongs to the attention itself (feature
  maps, projections and their statistics) starts anew.

  Args:
    train_state: of `state.create`.
    config: of this run.

  Returns:
    The state, and lines that say what it has from where.

  Raises:
    ValueError: no finished run is there, or its model is another.
  """

  def read():
    nonlocal variables
    workdir = Path(config.model.init_from)
    _check_finished(workdir)
    source = run_folder.stored_config(workdir)
    _check_same(workdir, to_dict(source), to_dict(config))
    trained = dict(load_pretrained(workdir).variables)
    ours = {"params": train_state.params, **train_state.collections}
    if source.model.attention == config.model.attention:
      variables = _take_shared(trained, ours)
    else:
      same = source.train.objective == config.train.objective
      variables = _take_fitting(trained, ours, None if same else SHARED)
    return _lines(workdir, trained, ours, variables)

  variables = None
  lines = hosts.from_main(read)
  like = {"params": train_state.params, **train_state.collections}
  variables = hosts.arrays_from_main(variables, like)
  params = variables.pop("params")
  new = train_state._replace(
    params=params,
    collections=variables,
    ema=None if train_state.ema is None else jax.tree.map(jnp.copy, params),
  )
  return new, lines


def _take_shared(trained: Variables, ours: Variables) -> Variables:
  """Of a model with the same attention: all of the shared parts."""
  params = dict(ours["params"])
  for name in SHARED:
    if name in params:
      params[name] = _take(name, trained["params"][name], params[name])
  variables = {**ours, "params": params}
  for collection, found in trained.items():
    if collection != "params":
      shared = {k: v for k, v in found.items() if k in SHARED}
      variables[collection] = {**ours.get(collection, {}), **shared}
  return variables


def _take_fitting(
  trained: Variables, ours: Variables, parts: Sequence[str] | None
) -> Variables:
  """Of a model with another attention: leaves of equal names and shapes.

  Args:
    trained: variables of the other run.
    ours: initial ones.
    parts: of the model; None for all.
  """
  for name in ("token_embedding", "position_embedding"):
    if name in ours["params"] and name in trained["params"]:
      taken = _take(name, trained["params"][name], ours["params"][name])
      trained = {**trained, "params": {**trained["params"], name: taken}}
  found = _by_path({k: v for k, v in trained.items() if k != _DRAWN})

  def pick(path, leaf):
    names = [part.key for part in path]
    other = found.get(jax.tree_util.keystr(path))
    if other is None or other.shape != leaf.shape or FEATURE_MAP in names:
      return leaf
    return other if parts is None or names[1] in parts else leaf

  return jax.tree_util.tree_map_with_path(pick, ours)


def _lines(
  workdir: Path, trained: Variables, ours: Variables, variables: Variables
) -> list[str]:
  """What was taken, what starts anew and what was left, by part."""
  old, new = _by_path(ours), _by_path(variables)
  taken = {path for path in new if new[path] is not old[path]}
  there = _by_path(trained)
  groups = {
    "taken": taken,
    "anew": new.keys() - taken,
    "left": there.keys() - taken,
  }
  return [
    f"config.model.init_from={str(workdir)!r}: {word}: {_parts(paths)}"
    for word, paths in groups.items()
    if paths
  ]


def _parts(paths: Iterable[str]) -> str:
  """Names of leaves, those of a part counted: encoder/layer_0 (12)."""
  names = (path[2:-2].split("']['") for path in paths)
  # Of the parameters by part; of other collections by name.
  parts = collections.Counter(
    "/".join(name[1:-1][:2] or name[1:]) if name[0] == "params" else name[0]
    for name in names
  )
  return ", ".join(f"{part} ({parts[part]})" for part in sorted(parts))


def _by_path(tree: PyTree) -> dict[str, Any]:
  """Leaves by path."""
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def check_source(workdir: Path, init_from: str) -> None:
  """Refuses what a new run cannot start from; one that resumes needs it not.

  Args:
    workdir: of the run.
    init_from: the config's.

  Raises:
    ValueError: no finished run is there.
  """
  if not any((workdir / run_folder.CHECKPOINTS).glob("[0-9]*")):
    _check_finished(Path(init_from))


def _check_finished(workdir: Path) -> None:
  """Refuses a folder that holds no finished run."""
  stored = run_folder.read_config(workdir)
  if stored is None or result_row(read_rows(workdir)) is None:
    raise ValueError(
      f"config.model.init_from must be the workdir of a finished run, got "
      f"{str(workdir)!r}."
    )


def _check_same(
  workdir: Path, source: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
  """Refuses weights of another encoder."""
  theirs, ours = flatten(source), flatten(config)
  free, sections = _FREE, ("model.", "feature_map.")
  if theirs["model.attention"] != ours["model.attention"]:
    free, sections = (*_FREE, *_OF_ATTENTION), ("model.",)
  for path in ours:
    if path in free or not path.startswith(sections):
      continue
    if theirs[path] != ours[path]:
      raise ValueError(
        f"config.model.init_from={str(workdir)!r} holds another model: "
        f"config.{path} is {theirs[path]!r} there and {ours[path]!r} here."
      )


def _take(name: str, found: PyTree, wanted: PyTree) -> PyTree:
  """`found`, whose shapes must be those of `wanted`."""
  if name == "token_embedding":
    # The mask token's row is the last; those who classify have no such token.
    rows = wanted["embedding"].shape[0]
    if found["embedding"].shape[0] == rows + 1:
      found = {"embedding": found["embedding"][:rows]}
  shapes = [
    {
      jax.tree_util.keystr(path): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (found, wanted)
  ]
  for path in sorted(shapes[0].keys() | shapes[1].keys()):
    there, here = (tree.get(path) for tree in shapes)
    if there != here:
      raise ValueError(
        f"config.model.init_from holds {name}{path} of shape {there}, and this "
        f"model needs {here}; set config.model.vocab_size and max_len alike."
      )
  return found
