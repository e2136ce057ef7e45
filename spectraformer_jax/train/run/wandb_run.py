"""Weights & Biases, for those who have it: one more view of metrics.jsonl."""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Names the run at Weights & Biases, so that a later start goes on in it.
ID_FILE = "wandb_id.txt"


def load(project: str | None) -> Any | None:
  """The package if it is asked for.

  Args:
    project: `config.logging.wandb`; None for no.

  Raises:
    ValueError: it cannot be imported.
  """
  if project is None:
    return None
  try:
    return importlib.import_module("wandb")
  except ImportError as error:
    raise ValueError(
      f"config.logging.wandb={project!r} needs the package wandb, which cannot "
      f"be imported ({error}); `pip install wandb`, or leave it at None."
    ) from error


def start(
  project: str | None, workdir: Path, config: Mapping[str, Any]
) -> Any | None:
  """A new run of a project, or that of an earlier start in this workdir.

  Rows that are written again after a resume are dropped there, since the step
  went back; they are equal to those it has.

  Args:
    project: as for `load`.
    workdir: keeps the run's id, and Weights & Biases' own files.
    config: shown beside the run.
  """
  wandb = load(project)
  if wandb is None:
    return None
  path = workdir / ID_FILE
  if not path.exists():
    path.write_text(uuid.uuid4().hex)
  return wandb.init(
    project=project,
    name=workdir.name,
    id=path.read_text(),
    resume="allow",
    dir=str(workdir),
    config=dict(config),
  )
