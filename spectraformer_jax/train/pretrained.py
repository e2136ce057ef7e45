"""The start of a run from what another one has learnt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from spectraformer_jax.nn import load_pretrained
from spectraformer_jax.train import hosts, state
from spectraformer_jax.train import workdir as files
from spectraformer_jax.train.config import flatten, to_dict
from spectraformer_jax.train.writers import read_rows, result_row
from spectraformer_jax.typing import PyTree

# What is taken over. The rest of a model belongs to what it is asked.
SHARED = ("token_embedding", "position_embedding", "encoder")

# Keys of the sections model and feature_map that may differ.
_FREE = (
  *("model.init_from", "model.pooling", "model.pooled_norm"),
  *("model.dropout_rate", "model.vocab_size", "model.max_len"),
  "feature_map.redraw_interval",
)


def start_from(
  train_state: state.TrainState, config: ConfigDict
) -> state.TrainState:
  """The first state of a run, with the weights of `config.model.init_from`.

  Embeddings, positions and encoder come from the best-dev parameters of that
  run, and so do its projections and running statistics, to which the weights
  belong. Heads, pooling and optimiser start anew.

  Args:
    train_state: of `state.create`.
    config: of this run.

  Raises:
    ValueError: no finished run is there, or its model is another.
  """

  def read():
    nonlocal variables
    workdir = Path(config.model.init_from)
    _check_finished(workdir)
    source = files.stored_config(workdir)
    _check_same(workdir, to_dict(source), to_dict(config))
    trained = dict(load_pretrained(workdir).variables)
    found, params = trained.pop("params"), dict(train_state.params)
    for name in SHARED:
      if name in params:
        params[name] = _take(name, found[name], params[name])
    collections = dict(train_state.collections)
    for collection, found in trained.items():
      shared = {k: v for k, v in found.items() if k in SHARED}
      collections[collection] = {**collections.get(collection, {}), **shared}
    variables = {**collections, "params": params}

  variables = None
  hosts.from_main(read)
  like = {"params": train_state.params, **train_state.collections}
  variables = hosts.arrays_from_main(variables, like)
  params = variables.pop("params")
  return train_state._replace(
    params=params,
    collections=variables,
    ema=None if train_state.ema is None else jax.tree.map(jnp.copy, params),
  )


def _check_finished(workdir: Path) -> None:
  """Refuses a folder that holds no finished run."""
  stored = files.read_config(workdir)
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
  for path in ours:
    if path in _FREE or not path.startswith(("model.", "feature_map.")):
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
