"""A trained model whose outputs a run learns instead of labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from spectraformer_jax.nn import from_config, load_pretrained
from spectraformer_jax.nn.from_config import Model
from spectraformer_jax.nn.pretrained import (
  checksum,
  find_step,
  one_line,
  variables_or_shapes,
)
from spectraformer_jax.train.config import Config, to_dict
from spectraformer_jax.train.devices import hosts
from spectraformer_jax.train.run import run_folder
from spectraformer_jax.typing import PyTree

# Facts about the data that must be the same in both runs.
_FACTS = ("tokenizer", "vocab_size", "id_shift", "num_classes", "pair")


class Teacher(NamedTuple):
  """The model of another run, and its best-dev variables.

  Attributes:
    model: from `nn.from_config.make_model`.
    variables: of the model.
    facts: JSON values that identify the variables: workdir, step, fingerprint.
  """

  model: Model
  variables: PyTree
  facts: dict[str, Any]


def load_teacher(
  config: Config, model: Model, facts: Mapping[str, Any]
) -> Teacher | None:
  """Loads the model of `config.train.teacher`; None without a teacher.

  Args:
    config: of the run that learns.
    model: of that run.
    facts: of its train split.

  Raises:
    ValueError: the folder holds no run that was evaluated, or one of another
      objective, vocabulary, number of classes or length.
  """
  if not config.train.teacher:
    return None
  workdir = Path(config.train.teacher)
  try:
    # Only process 0 needs the folder.
    stored = hosts.from_main(_stored, workdir)
    _check_same_task(stored, config, facts)
    teacher_config = ConfigDict(stored["config"])
    feature_map = from_config.make_feature_map(teacher_config)
    teacher = from_config.make_model(
      teacher_config, feature_map, stored["data"]["train"]
    )
    if teacher.max_len < model.max_len:
      raise ValueError(
        f"it was made for {teacher.max_len} positions, and this run has "
        f"{model.max_len}."
      )
    variables, found = hosts.arrays_from_main(
      lambda: _load(workdir), like=variables_or_shapes(teacher, feature_map)
    )
  except ValueError as error:
    raise ValueError(
      f"config.train.teacher={str(workdir)!r}: {one_line(error)}"
    ) from error
  return Teacher(teacher, variables, found)


def _stored(workdir: Path) -> dict[str, Any]:
  """Returns config.json of the teacher, its config with all defaults."""
  stored = run_folder.stored_run(workdir)
  config = run_folder.stored_config(workdir)
  return {"data": stored["data"], "config": to_dict(config)}


def _check_same_task(
  stored: Mapping[str, Any], config: Config, facts: Mapping[str, Any]
) -> None:
  """Refuses a teacher that reads or predicts something else.

  Raises:
    ValueError: names what differs, with both values.
  """
  pairs = {
    "train.objective": (
      stored["config"]["train"]["objective"],
      config.train.objective,
    )
  }
  theirs = stored["data"]["train"]
  pairs |= {name: (theirs.get(name), facts[name]) for name in _FACTS}
  for name, (there, here) in pairs.items():
    if there != here:
      raise ValueError(f"its {name} is {there!r}, and that here is {here!r}.")


def _load(workdir: Path) -> tuple[PyTree, dict[str, Any]]:
  """Returns the variables, and the facts that identify them."""
  step = find_step(workdir, "best")
  variables = load_pretrained(workdir, step=step).variables
  return variables, {
    "workdir": str(workdir),
    "step": step,
    "fingerprint": checksum(variables)[:12],
  }
