"""Weights & Biases, an optional view of metrics.jsonl."""

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The file with the id of the run at Weights & Biases; a later start of this run
# continues the run of this id.
ID_FILE = "wandb_id.txt"


def load(project: str | None) -> Any | None:
  """Imports the package `wandb` if there is a project; None otherwise.

  Args:
    project: `config.logging.wandb`.

  Raises:
    ValueError: the package cannot be imported.
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
  """Starts a run of a project, or continues that of this workdir.

  After a resume, Weights & Biases drops rows of steps that it has already; they
  are equal to the rows that it has.

  Args:
    project: `config.logging.wandb`; None starts no run.
    workdir: holds the run's id and the package's own files.
    config: shown beside the run.

  Returns:
    The run; None without a project.
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
