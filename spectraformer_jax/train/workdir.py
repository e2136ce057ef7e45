"""The folder of a run: what it holds, and which run may go on in it."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import spectraformer_jax
from spectraformer_jax.nn import pretrained
from spectraformer_jax.train import parallel
from spectraformer_jax.train.config import default_config, flatten, to_dict

CONFIG, CHECKPOINTS = pretrained.CONFIG, pretrained.CHECKPOINTS
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
REPORT = "report.md"
CURVES = "curves.png"

# What does not change the training, so it may change between two starts.
FREE_SECTIONS = ("checkpoint.", "logging.", "train.parallel", "profile")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check_config(workdir: Path, config: Mapping[str, Any]) -> None:
  """Refuses a workdir that holds another run.

  Args:
    workdir: may not exist.
    config: plain values (`config.to_dict`).

  Raises:
    ValueError: names the first key that differs, with both values. Keys of
      `FREE_SECTIONS` may differ. A key that the stored config does not know
      yet had what is its default now.
  """
  stored = read_config(workdir)
  if stored is None:
    return
  # A key that was not there yet had its default's effect.
  defaults = flatten(to_dict(default_config()))
  old = defaults | flatten(stored["config"])
  new = flatten(config)
  for path in sorted(old.keys() | new.keys()):
    if path.startswith(FREE_SECTIONS) or old.get(path) == new.get(path):
      continue
    raise ValueError(
      f"workdir {str(workdir)!r} holds another config: config.{path} is "
      f"{old.get(path)!r} there and {new.get(path)!r} here; use the old value "
      "or another --workdir."
    )


def check_data(workdir: Path, data: Mapping[str, Any]) -> None:
  """Refuses to go on with other examples than the run started with.

  Raises:
    ValueError: names the split whose fingerprint differs.
  """
  stored = read_config(workdir)
  if stored is None:
    return
  for split, facts in data.items():
    old, new = stored["data"][split]["fingerprint"], facts["fingerprint"]
    if old != new:
      raise ValueError(
        f"workdir {str(workdir)!r} was trained on other data: the {split} "
        f"split had fingerprint {old}, and has {new} now; use another "
        "--workdir."
      )


def write_config(
  workdir: Path,
  config: Mapping[str, Any],
  data: Mapping[str, Any],
  command: str | None,
) -> None:
  """Writes config.json; a later start adds its environment if it differs."""
  stored = read_config(workdir) or {"environments": []}
  now = environment(command)
  environments = stored["environments"]
  if not environments or environments[-1] != now:
    environments = [*environments, now]
  write_json(
    workdir / CONFIG,
    {"config": config, "data": data, "environments": environments},
  )


def read_config(workdir: Path) -> dict[str, Any] | None:
  """config.json, or None."""
  path = workdir / CONFIG
  return json.loads(path.read_text()) if path.exists() else None


def stored_run(workdir: Path) -> dict[str, Any]:
  """The content of config.json.

  Raises:
    ValueError: the folder holds no run.
  """
  stored = read_config(workdir)
  if stored is None:
    raise ValueError(f"{str(workdir)!r} is no workdir: no {CONFIG}.")
  return stored


def stored_config(workdir: Path) -> ConfigDict:
  """The config of a run, where a key that is new has its default.

  Raises:
    ValueError: the folder holds no run.
  """
  config = default_config()
  config.update(stored_run(workdir)["config"])
  return config


def write_json(path: Path, value: Any) -> None:
  """Writes the whole file or nothing."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
  """Writes the whole file or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  with partial.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def environment(command: str | None) -> dict[str, Any]:
  """Versions, revision, devices and the command, as JSON values."""
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
  """Of the checkout this code runs from; None outside of one."""
  root = Path(spectraformer_jax.__file__).parents[1]
  if not (root / ".git").exists():
    return None
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
