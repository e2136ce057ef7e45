"""The folder of a run: its files, and which runs may resume in it."""

import errno
import importlib.metadata
import json
import os
import platform
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import spectraformer_jax
from spectraformer_jax.nn import pretrained
from spectraformer_jax.train.config import (
  Config,
  default_config,
  flatten,
  to_dict,
  validate,
)
from spectraformer_jax.train.devices import parallel

# Names of files and folders in a workdir.
CONFIG, CHECKPOINTS = pretrained.CONFIG, pretrained.CHECKPOINTS
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
REPORT = "report.md"
CURVES = "curves.png"
# Parts of config.json.
PARTS = ("config", "data", "environments")
TEACHER = "teacher"  # only of a run that has one

NUM_STEPS = "train.num_steps"
# Schedules whose learning rates do not depend on the number of steps.
ENDLESS_SCHEDULES = ("rsqrt",)
# Error numbers of a wrong path: another try with the same path fails as well.
PATH_ERRNOS = (
  errno.ENAMETOOLONG,
  errno.ENOTDIR,
  errno.ELOOP,
  errno.EISDIR,
  errno.EEXIST,
)
# Keys of the config that begin like this do not change the training, so they
# may change between two starts of a run.
FREE_PREFIXES = ("checkpoint.", "logging.", "train.parallel", "profile")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check_config(workdir: Path, config: Mapping[str, Any]) -> None:
  """Refuses a workdir that holds another run.

  Args:
    workdir: need not exist.
    config: plain values (`config.to_dict`).

  Raises:
    ValueError: names the first key that differs, with both values. Keys that
      begin like one of `FREE_PREFIXES` may differ, and the number of steps may
      grow with one of `ENDLESS_SCHEDULES`. A stored config of an earlier
      version may lack keys; they count as having their defaults.
  """
  stored = read_config(workdir, parts=("config",))
  if stored is None:
    if any((workdir / CHECKPOINTS).glob("[0-9]*")):
      raise ValueError(
        f"workdir {str(workdir)!r} has checkpoints but no {CONFIG}, which says "
        "which run they are of; put the file back or use another --workdir."
      )
    return
  defaults = flatten(to_dict(default_config()))
  old = defaults | flatten(stored["config"])
  new = flatten(config)
  for path in sorted(old.keys() | new.keys()):
    if path.startswith(FREE_PREFIXES) or old.get(path) == new.get(path):
      continue
    why = _why_num_steps_is_fixed(old, new) if path == NUM_STEPS else ""
    if why is None:
      continue
    raise ValueError(
      f"workdir {str(workdir)!r} holds another config: config.{path} is "
      f"{old.get(path)!r} there and {new.get(path)!r} here{why}; use the old "
      "value or another --workdir."
    )


def _why_num_steps_is_fixed(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> str | None:
  """Returns why the number of steps may not change; None if it may."""
  schedule = new["optim.schedule"]
  endless = " and ".join(map(repr, ENDLESS_SCHEDULES))
  if not isinstance(old[NUM_STEPS], int) or new[NUM_STEPS] < old[NUM_STEPS]:
    return ", and it can only grow"
  if schedule in ENDLESS_SCHEDULES:
    return None
  return (
    f", and the learning rate of config.optim.schedule={schedule!r} depends on "
    f"it from the first step (that of {endless} does not)"
  )


def check_folder(workdir: Path) -> None:
  """Refuses a path that can never be a folder, before any work.

  Raises:
    ValueError: the path or one of its parents is a file, or its name is too
      long.
  """
  for path in (workdir, *workdir.parents):
    try:
      if stat.S_ISDIR(os.stat(path).st_mode):
        return
      why = f"{str(path)!r} is a file"
    except FileNotFoundError:
      continue
    except OSError as error:
      if error.errno not in PATH_ERRNOS:
        raise
      why = str(error.strerror).lower()
    except ValueError as error:  # the path has a null byte
      why = str(error)
    raise ValueError(
      "--workdir must be a folder or the name of one to be made, got "
      f"{str(workdir)[:200]!r}: {why}."
    )


def check_data(workdir: Path, data: Mapping[str, Any]) -> None:
  """Refuses to resume with other examples than the run started with.

  Raises:
    ValueError: names the split whose fingerprint differs.
  """
  stored = read_config(workdir)
  if stored is None:
    return
  for split, facts in data.items():
    old = stored["data"].get(split, {}).get("fingerprint")
    new = facts["fingerprint"]
    if old != new:
      raise ValueError(
        f"workdir {str(workdir)!r} was trained on other data: the {split} "
        f"split had fingerprint {old}, and has {new} now; use another "
        "--workdir."
      )


def check_teacher(workdir: Path, teacher: Mapping[str, Any] | None) -> None:
  """Refuses to resume with another teacher than the run started with.

  Args:
    workdir: of the run that learns.
    teacher: facts that identify the teacher; None without one.

  Raises:
    ValueError: names what differs, with both values.
  """
  stored = read_config(workdir)
  if stored is None or teacher is None:
    return
  old = stored.get(TEACHER, {})
  for name in ("step", "fingerprint"):
    if old.get(name) != teacher[name]:
      raise ValueError(
        f"workdir {str(workdir)!r} was trained with another teacher: {name} of "
        f"config.train.teacher={teacher['workdir']!r} was {old.get(name)!r}, "
        f"and is {teacher[name]!r} now; use another --workdir."
      )


def write_config(
  workdir: Path,
  config: Mapping[str, Any],
  data: Mapping[str, Any],
  command: str | None,
  teacher: Mapping[str, Any] | None = None,
) -> None:
  """Writes config.json; adds this environment if the last one differs."""
  stored = read_config(workdir) or {"environments": []}
  now = environment(command)
  environments = stored["environments"]
  if not environments or environments[-1] != now:
    environments = [*environments, now]
  contents = {"config": config, "data": data, "environments": environments}
  if teacher is not None:
    contents[TEACHER] = teacher
  write_text(workdir / CONFIG, json.dumps(contents, indent=2) + "\n")


def read_config(
  workdir: Path, *, parts: Sequence[str] = PARTS
) -> dict[str, Any] | None:
  """Reads config.json, which must have these parts; None without the file.

  Raises:
    ValueError: the file is damaged.
  """
  return pretrained.read_config(workdir, parts)


def stored_run(workdir: Path) -> dict[str, Any]:
  """Reads config.json of a run.

  Raises:
    ValueError: the folder holds no run, or the file is damaged.
  """
  stored = read_config(workdir)
  if stored is None:
    raise ValueError(f"{str(workdir)!r} is no workdir: no {CONFIG}.")
  return stored


def stored_config(workdir: Path) -> Config:
  """Reads the config of a run; missing keys have their defaults.

  Raises:
    ValueError: the folder holds no run, or the file is damaged.
  """
  config = default_config()
  stored = stored_run(workdir)["config"]
  try:
    config.update(stored)
    validate(config)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise pretrained.damaged(workdir, error) from error
  return config


def set_aside(path: Path) -> Path:
  """Renames a damaged file to a name that is not used yet, and returns it."""
  number = 1
  while (place := path.with_name(f"{path.name}.damaged-{number}")).exists():
    number += 1
  return path.replace(place)


def write_text(path: Path, text: str) -> None:
  """Writes a whole file; if that fails, the old file stays as it was."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  with partial.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def environment(command: str | None) -> dict[str, Any]:
  """Returns versions, revision, devices and the command, as JSON values."""
  return {
    "command": command,
    "spectraformer_jax": spectraformer_jax.__version__,
    "git_revision": _git_revision(),
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
    "platform": platform.platform(),
    "cpus": os.cpu_count(),
    "devices": parallel.device_kinds(),
  }


def _git_revision() -> str | None:
  """Returns the revision of the checkout of this code; None outside of one."""
  root = Path(spectraformer_jax.__file__).parents[1]
  if not (root / ".git").exists():
    return None
  # `describe` names no tag here; it adds "-dirty" if files were changed.
  command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
  try:
    done = subprocess.run(
      [*command, "--abbrev=40", "--exclude=*"],
      capture_output=True,
      text=True,
      timeout=10,
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() or None
