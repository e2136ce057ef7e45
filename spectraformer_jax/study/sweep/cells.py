"""A sweep: tasks x attentions x seeds x any override, as cells.

A sweep file (``configs/sweeps/*.py``) has a ``get_sweep()`` that returns a
`Sweep`. A cell is one training run; its folder below the sweep's is
``<task>/<attention>/seed<seed>``.
"""

import ast
import dataclasses
import itertools
import json
import runpy
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spectraformer_jax import list_components
from spectraformer_jax.nn.attention import ATTENTIONS
from spectraformer_jax.registry import nearest
from spectraformer_jax.train import config as train_config

CELL = "cell.json"
_BASELINES = tuple(name for name in ATTENTIONS if name != "spectral")
LOG = "log.txt"


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What to run.

  Attributes:
    tasks: label -> experiment, ``"configs/listops.py:quick"``.
    attentions: names (a pair, "oprf-orf", or a baseline, "softmax"), or label
      -> overrides; a label that is a name selects it.
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
  """One run.

  Attributes:
    task: label.
    attention: label.
    seed: of training.
    experiment: file and variant of its config.
    overrides: all of them, those of attention and seed included.
  """

  task: str
  attention: str
  seed: int
  experiment: str
  overrides: Mapping[str, Any]

  @property
  def name(self) -> str:
    """``task/attention/seed0``: its folder."""
    return f"{self.task}/{self.attention}/seed{self.seed}"

  def config(self) -> ConfigDict:
    """The config, locked and checked.

    Raises:
      ValueError: no such experiment, or an unknown key or wrong value.
    """
    config = load_experiment(self.experiment)
    for path, value in self.overrides.items():
      override(config, path, value)
    train_config.validate(config)
    return config.lock()

  def command(self, workdir: Path) -> str:
    """What to type to get this run alone."""
    flags = [f"--config={self.experiment}"]
    flags += [f"--config.{path}={v}" for path, v in self.overrides.items()]
    return shlex.join(["python", "train.py", *flags, f"--workdir={workdir}"])

  def to_json(self) -> str:
    """For `cell_from_json`."""
    return json.dumps(dataclasses.asdict(self), indent=2)


def cell_from_json(text: str) -> Cell:
  """The cell that `Cell.to_json` wrote."""
  return Cell(**json.loads(text))


def expand(sweep: Sweep) -> list[Cell]:
  """All cells, the first seed of everything first.

  Raises:
    ValueError: a label that cannot be a folder, or overrides of a task that the
      sweep does not have.

  Example:
    >>> cells = expand(Sweep({"digits": "configs/digits.py"}, ["oprf-orf"]))
    >>> [cell.name for cell in cells]
    ['digits/oprf-orf/seed0']
  """
  unknown = [task for task in sweep.task_overrides if task not in sweep.tasks]
  if unknown:
    raise ValueError(
      f"task_overrides of {unknown[0]!r}, which is no task of this sweep: "
      f"{', '.join(sweep.tasks)}."
    )
  cells = []
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
    cells.append(Cell(task, attention, seed, experiment, overrides))
  names = [cell.name for cell in cells]
  twice = {name for name in names if names.count(name) > 1}
  if twice:
    raise ValueError(f"cell {min(twice)!r} is there twice.")
  return cells


def _attentions(sweep: Sweep) -> Iterator[tuple[str, dict[str, Any]]]:
  """Label and overrides of each attention and combination of `vary`."""
  named = sweep.attentions
  if not isinstance(named, Mapping):
    named = {name: {} for name in named}
  for combination in itertools.product(*sweep.vary.values()):
    varied = dict(zip(sweep.vary, combination, strict=True))
    suffix = "".join(f",{k.split('.')[-1]}={v}" for k, v in varied.items())
    for label, overrides in named.items():
      selected = select(label)
      if not selected and not any(map(_selects, overrides)):
        raise ValueError(
          f"{label!r} is no pair and no baseline, and has no override that "
          f"selects one.{nearest(label, [*_BASELINES, *list_components()])}"
        )
      yield label + suffix, {**selected, **varied, **overrides}


def _selects(path: str) -> bool:
  """Whether a key chooses an attention."""
  return path == "model.attention" or path.startswith("feature_map.")


def select(attention: str) -> dict[str, Any]:
  """The overrides that choose an attention by name; none for another label.

  Example:
    >>> select("softmax")
    {'model.attention': 'softmax'}
    >>> select("oprf-orf")["feature_map.weight_matrix"]
    'orf'
  """
  if attention in _BASELINES:
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
  """The sweep of a file.

  Raises:
    ValueError: no such file, or one without ``get_sweep``.
  """
  if not Path(path).is_file():
    raise ValueError(f"There is no sweep file {str(path)!r}.")
  names = runpy.run_path(str(path))
  if "get_sweep" not in names:
    raise ValueError(f"{str(path)!r} has no get_sweep().")
  return names["get_sweep"]()


def load_experiment(experiment: str) -> ConfigDict:
  """The config of ``configs/X.py[:variant]``, unlocked.

  Raises:
    ValueError: no such file, or an unknown variant.
  """
  path, _, variant = experiment.partition(":")
  if not Path(path).is_file():
    raise ValueError(f"There is no config file {path!r}.")
  return runpy.run_path(path)["get_config"](variant or None)


def override(config: ConfigDict, path: str, value: Any) -> None:
  """Sets a dotted key; new keys in the open sections only.

  Raises:
    ValueError: an unknown key, or a value of another type.
  """
  train_config.check_key(path)
  if train_config.is_none(path, value):
    value = None
  *parents, last = path.split(".")
  for parent in parents:
    config = config[parent]
  try:
    config[last] = value
  except TypeError as error:
    raise ValueError(f"config.{path}={value!r}: {error}") from error


def parse_value(text: str) -> Any:
  """A Python literal, or else the text itself.

  Example:
    >>> [parse_value(text) for text in ("1e-3", "true", "cosine")]
    [0.001, True, 'cosine']
  """
  if text.lower() in ("true", "false"):
    return text.lower() == "true"
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text
