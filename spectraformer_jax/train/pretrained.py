"""Starts a run from the weights of another run."""

import collections
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.nn import load_pretrained
from spectraformer_jax.train.config import Config, flatten, to_dict
from spectraformer_jax.train.devices import hosts
from spectraformer_jax.train.run import run_folder
from spectraformer_jax.train.run.writers import read_rows, result_row
from spectraformer_jax.train.step import state
from spectraformer_jax.train.step.optim import FEATURE_MAP
from spectraformer_jax.typing import PyTree

# Parts of a model that do not depend on its task. Head and pooling depend on
# it, so they are initialised anew.
SHARED = ("token_embedding", "position_embedding", "encoder")
EMBEDDINGS = SHARED[:2]

# Keys of the sections model and feature_map that may differ between the runs.
_FREE_KEYS = {
  "model.init_from",
  "model.init_head",
  "model.pooling",
  "model.pooled_norm",
  "model.dropout_rate",
  "model.vocab_size",
  "model.max_len",
  "model.window",
  "model.num_sinks",
  "model.num_heavy",
  "feature_map.redraw_interval",
}
# Of these, keys on which head and pooling depend.
_HEAD_KEYS = {"model.pooling", "model.pooled_norm"}
# Keys that may differ as well if the runs have different attentions.
_ATTENTION_KEYS = {"model.attention", "model.attention_kwargs"}

Variables = Mapping[str, PyTree]


def start_from(
  train_state: state.TrainState, config: Config
) -> tuple[state.TrainState, list[str]]:
  """Returns the first state of a run that starts from `config.model.init_from`.

  Embeddings, positions and encoder are those of the best-dev parameters of that
  run. Projections and running statistics are those of that run too, since the
  weights are adapted to them. Head, pooling and optimiser stay as they were
  initialised; with `config.model.init_head`, head and pooling are taken too.

  From a run with another `model.attention`, such as an exact one, every
  parameter is taken that has the name and the shape of one of this model; the
  head only if both runs have the same objective. Feature maps, projections and
  their statistics, which belong to the attention, stay as they were
  initialised.

  Args:
    train_state: of `state.create`.
    config: of this run.

  Returns:
    The state, and lines that say which parts were taken.

  Raises:
    ValueError: the folder holds no finished run, or one of another model; or
      its head, if that is to be taken, is that of another objective or task.
  """
  initial = {"params": train_state.params, **train_state.collections}
  variables, lines = hosts.arrays_from_main(
    lambda: _merge(initial, config), like=initial
  )
  params = variables.pop("params")
  new = train_state._replace(
    params=params,
    collections=variables,
    ema=None if train_state.ema is None else jax.tree.map(jnp.copy, params),
  )
  return new, lines


def _merge(
  initial: Variables, config: Config
) -> tuple[dict[str, PyTree], list[str]]:
  """Returns `initial` with parts of the other run, and lines that name them."""
  workdir = Path(config.model.init_from or "")
  _check_finished(workdir)
  source = run_folder.stored_config(workdir)
  _check_same_model(workdir, to_dict(source), to_dict(config))
  trained = load_pretrained(workdir).variables
  same_head = source.train.objective == config.train.objective
  if config.model.init_head:
    _check_head(workdir, source, config, trained["params"], initial["params"])
  if source.model.attention == config.model.attention:
    parts = initial["params"].keys() if config.model.init_head else SHARED
    variables = _with_parts(initial, trained, parts)
  else:
    variables = _with_fitting_leaves(
      initial, trained, None if same_head else SHARED
    )
  return variables, _describe(workdir, trained, initial, variables)


def _check_head(
  workdir: Path, source: Config, config: Config, trained: PyTree, new: PyTree
) -> None:
  """Refuses a source run whose head and pooling are not those of `config`."""
  if source.train.objective != config.train.objective:
    raise ValueError(
      f"config.model.init_head=True needs a run of the same objective: "
      f"config.train.objective is {source.train.objective!r} in "
      f"{str(workdir)!r} and {config.train.objective!r} here."
    )
  for name in new.keys() - set(SHARED):
    _fit(name, trained.get(name, {}), new[name])


def _with_parts(
  initial: Variables, trained: Variables, parts: Collection[str]
) -> dict[str, PyTree]:
  """Replaces parts by those of a model with the same attention."""
  params = dict(initial["params"])
  for name in parts:
    if name in params:
      params[name] = _fit(name, trained["params"][name], params[name])
  variables = {**initial, "params": params}
  for collection, of_parts in trained.items():
    if collection != "params":
      taken = {name: part for name, part in of_parts.items() if name in parts}
      variables[collection] = {**initial.get(collection, {}), **taken}
  return variables


def _with_fitting_leaves(
  initial: Variables, trained: Variables, parts: Collection[str] | None
) -> dict[str, PyTree]:
  """Replaces leaves by those of equal name and shape, but no feature maps.

  Args:
    initial: variables of the new model.
    trained: variables of a model with another attention.
    parts: names of the parts whose leaves are replaced; None for all.
  """
  params = dict(trained["params"])
  for name in EMBEDDINGS:
    if name in params and name in initial["params"]:
      params[name] = _fit(name, params[name], initial["params"][name])
  others = {k: v for k, v in trained.items() if k != "random_features"}
  trained_leaves = _by_path({**others, "params": params})

  def choose(path: tuple[Any, ...], leaf: Any) -> Any:
    names = _names(path)
    taken = trained_leaves.get(names)
    if taken is None or taken.shape != leaf.shape or FEATURE_MAP in names:
      return leaf
    return taken if parts is None or names[1] in parts else leaf

  return jax.tree_util.tree_map_with_path(choose, dict(initial))


def _describe(
  workdir: Path, trained: Variables, initial: Variables, variables: Variables
) -> list[str]:
  """Returns lines: which leaves were taken, initialised and left out."""
  old, new, source = map(_by_path, (initial, variables, trained))
  # A leaf that was not taken is still the same array.
  taken = {path for path in new if new[path] is not old.get(path)}
  groups = {
    "taken": taken,
    "initialised": new.keys() - taken,
    "left out": source.keys() - taken,
  }
  return [
    f"config.model.init_from={str(workdir)!r}: {word}: {_count_by_part(paths)}"
    for word, paths in groups.items()
    if paths
  ]


def _count_by_part(paths: Iterable[tuple[str, ...]]) -> str:
  """Counts leaves: parameters by part of the model, others by collection.

  Args:
    paths: of leaves, such as ("params", "head", "bias").

  Returns:
    Text like "encoder/layer_0 (12), random_features (4)".
  """
  parts = collections.Counter(
    "/".join(names[:-1][:2] or names) if collection == "params" else collection
    for collection, *names in paths
  )
  return ", ".join(f"{part} ({parts[part]})" for part in sorted(parts))


def _by_path(tree: PyTree) -> dict[tuple[str, ...], Any]:
  return {
    _names(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(entry.key for entry in path)


def check_source(workdir: Path, init_from: str) -> None:
  """Refuses an `init_from` without a finished run; a resumed run needs none.

  Args:
    workdir: of the new run.
    init_from: `config.model.init_from`.

  Raises:
    ValueError: `init_from` holds no finished run.
  """
  if not any((workdir / run_folder.CHECKPOINTS).glob("[0-9]*")):
    _check_finished(Path(init_from))


def _check_finished(workdir: Path) -> None:
  stored = run_folder.read_config(workdir)
  if stored is None or result_row(read_rows(workdir)) is None:
    raise ValueError(
      f"config.model.init_from must be the workdir of a finished run, got "
      f"{str(workdir)!r}."
    )


def _check_same_model(
  workdir: Path, source: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
  """Refuses a source run whose model or feature map is not that of `config`."""
  theirs, ours = flatten(source), flatten(config)
  free, sections = _FREE_KEYS, ("model.", "feature_map.")
  if theirs["model.attention"] != ours["model.attention"]:
    free, sections = _FREE_KEYS | _ATTENTION_KEYS, ("model.",)
  if ours["model.init_head"]:
    free = free - _HEAD_KEYS
  for path in ours:
    if path in free or not path.startswith(sections):
      continue
    if theirs[path] != ours[path]:
      raise ValueError(
        f"config.model.init_from={str(workdir)!r} holds another model: "
        f"config.{path} is {theirs[path]!r} there and {ours[path]!r} here."
      )


def _fit(name: str, trained: PyTree, initial: PyTree) -> PyTree:
  """Returns `trained`, whose leaves must have the shapes of `initial`.

  The trained token embedding may have one row more, its last, for the mask
  token. A classifier has no mask token, so this row is dropped.
  """
  if name == "token_embedding":
    rows = initial["embedding"].shape[0]
    if trained["embedding"].shape[0] == rows + 1:
      trained = {"embedding": trained["embedding"][:rows]}
  advice = "give both runs the same config.model.vocab_size and max_len."
  if name not in SHARED:
    advice = "leave the head out with config.model.init_head=False."
  there, here = (
    {path: leaf.shape for path, leaf in _by_path(tree).items()}
    for tree in (trained, initial)
  )
  for path in sorted(there.keys() | here.keys()):
    if there.get(path) != here.get(path):
      raise ValueError(
        f"config.model.init_from holds {'/'.join((name, *path))} of shape "
        f"{there.get(path)}, and this model needs {here.get(path)}; {advice}"
      )
  return trained
