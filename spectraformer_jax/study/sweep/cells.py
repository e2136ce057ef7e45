"""Expands a sweep, tasks x attentions x seeds x any override, into cells.

A sweep file (``configs/sweeps/*.py``) has a ``get_sweep()`` that returns a
`Sweep`. A cell is one training run; its folder is
``<task>/<attention>/seed<seed>``, below the folder of the sweep.
"""

import dataclasses
import itertools
import json
import runpy
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectraformer_jax import list_components
from spectraformer_jax.commands import parse_literal
from spectraformer_jax.nn.attention_base import ATTENTIONS
from spectraformer_jax.registry import nearest
from spectraformer_jax.train import config as train_config
from spectraformer_jax.train.config import Config

# Files in the folder of a cell.
CELL, LOG = "cell.json", "log.txt"
_BASELINE_ATTENTIONS = tuple(name for name in ATTENTIONS if name != "spectral")


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The runs of a sweep.

  Attributes:
    tasks: label -> experiment, such as ``"configs/listops.py:quick"``.
    attentions: names of pairs ("oprf-orf") or baseline attentions ("softmax"),
      or label -> overrides; a label that is such a name selects it as well.
    seeds: of training.
    overrides: of every cell, dotted key -> value.
    task_overrides: label of a task -> overrides; they win over `overrides`.
    vary: dotted key -> values; every combination is an attention of its own.
  """

  tasks: Mapping[str, str]
  attentions: Sequence[str] | Mapping[str, Mapping[str, Any]]
  seeds: Sequence[int] = (0,)
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  task_overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  vary: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cell:
  """One training run of a sweep.

  Attributes:
    task: label.
    attention: label.
    seed: of training.
    experiment: file and variant of the config.
    overrides: of the config; those of attention and seed included.
  """

  task: str
  attention: str
  seed: int
  experiment: str
  overrides: Mapping[str, Any]

  @property
  def name(self) -> str:
    """``task/attention/seed0``: the cell's folder, below that of the sweep."""
    return f"{self.task}/{self.attention}/seed{self.seed}"

  def config(self) -> Config:
    """Returns the config, locked and checked.

    Raises:
      ValueError: no such experiment, or an unknown key or wrong value.
    """
    config = _load_experiment(self.experiment)
    for path, value in self.overrides.items():
      _override(config, path, value)
    train_config.validate(config)
    config.lock()
    return config

  def command(self, workdir: Path) -> str:
    """Returns the command line that repeats this run alone."""
    flags = [f"--config={self.experiment}"]
    flags += [f"--config.{path}={v}" for path, v in self.overrides.items()]
    return shlex.join(["python", "train.py", *flags, f"--workdir={workdir}"])

  def to_json(self) -> str:
    """Returns the cell as text, which `cell_from_json` reads."""
    return json.dumps(dataclasses.asdict(self), indent=2)


def cell_from_json(text: str) -> Cell:
  """Reads the cell from the text of `Cell.to_json`."""
  return Cell(**json.loads(text))


def expand(sweep: Sweep) -> list[Cell]:
  """Returns all cells, seed by seed, so that every attention starts early.

  Raises:
    ValueError: a label cannot be the name of a folder, two cells have one name,
      or there are overrides of a task that the sweep does not have.

  Example:
    >>> cells = expand(Sweep({"digits": "configs/digits.py"}, ["oprf-orf"]))
    >>> [cell.name for cell in cells]
    ['digits/oprf-orf/seed0']
  """
  for task in sweep.task_overrides:
    if task not in sweep.tasks:
      raise ValueError(
        f"task_overrides of {task!r}, which is no task of this sweep: "
        f"{', '.join(sweep.tasks)}."
      )
  cells: dict[str, Cell] = {}
  for seed, (task, experiment), (attention, selected) in itertools.product(
    sweep.seeds, sweep.tasks.items(), list(_attentions(sweep))
  ):
    for label in (task, attention):
      if not label or "/" in label or label.startswith("."):
        raise ValueError(f"{label!r} cannot be the name of a folder.")
    overrides = {
      **sweep.overrides,
      **sweep.task_overrides.get(task, {}),
      **selected,
      "train.seed": seed,
    }
    cell = Cell(task, attention, seed, experiment, overrides)
    if cell.name in cells:
      raise ValueError(f"cell {cell.name!r} is there twice.")
    cells[cell.name] = cell
  return list(cells.values())


def _attentions(sweep: Sweep) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields label and overrides of each attention in each value of `vary`."""
  named, known = sweep.attentions, [*_BASELINE_ATTENTIONS, *list_components()]
  if not isinstance(named, Mapping):
    named = {name: {} for name in named}
  for combination in itertools.product(*sweep.vary.values()):
    varied = dict(zip(sweep.vary, combination, strict=True))
    suffix = "".join(f",{k.split('.')[-1]}={v}" for k, v in varied.items())
    for label, overrides in named.items():
      selected = select(label)
      if not selected and not any(
        path == "model.attention" or path.startswith("feature_map.")
        for path in overrides
      ):
        raise ValueError(
          f"{label!r} is no pair and no baseline attention, and no override "
          f"selects one.{nearest(label, known)}"
        )
      yield label + suffix, {**selected, **varied, **overrides}


def select(attention: str) -> dict[str, Any]:
  """Returns the overrides that choose an attention by its name.

  Returns none for a label that is not the name of an attention.

  Example:
    >>> select("softmax")
    {'model.attention': 'softmax'}
    >>> select("oprf-orf")["feature_map.weight_matrix"]
    'orf'
  """
  if attention in _BASELINE_ATTENTIONS:
    return {"model.attention": attention}
  component, _, matrix = attention.partition("-")
  if component not in list_components() or not matrix:
    return {}
  return {
    "model.attention": "spectral",
    "feature_map.component": component,
    "feature_map.weight_matrix": matrix,
  }


def load_sweep(path: str | Path) -> Sweep:
  """Returns the sweep of a file.

  Raises:
    ValueError: no such file, or one without ``get_sweep``.
  """
  if not Path(path).is_file():
    raise ValueError(f"There is no sweep file {str(path)!r}.")
  names = runpy.run_path(str(path))
  if "get_sweep" not in names:
    raise ValueError(f"{str(path)!r} has no get_sweep().")
  return names["get_sweep"]()


def _load_experiment(experiment: str) -> Config:
  """Returns the config of ``configs/X.py[:variant]``, unlocked."""
  path, _, variant = experiment.partition(":")
  if not Path(path).is_file():
    raise ValueError(f"There is no config file {path!r}.")
  return runpy.run_path(path)["get_config"](variant or None)


def _override(config: Config, path: str, value: Any) -> None:
  """Sets a dotted key; ValueError for an unknown key or another type."""
  train_config.check_key(path)
  if train_config.is_none(path, value):
    value = None
  try:
    config.update_from_flattened_dict({path: value})
  except TypeError as error:
    raise ValueError(f"config.{path}={value!r}: {error}") from error


def parse_value(text: str) -> Any:
  """Returns the value of a Python literal, true or false, else the text itself.

  Example:
    >>> [parse_value(text) for text in ("1e-3", "true", "cosine")]
    [0.001, True, 'cosine']
  """
  truth = {"true": True, "false": False}
  return truth.get(text.lower(), parse_literal(text))
