"""The file of a fitted layer: variables, report, settings and fingerprints."""

import inspect
import json
import os
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import exact_keys_of
from spectraformer_jax.linearize.fit import fit_feature_map
from spectraformer_jax.linearize.records import FitReport, FittedLayer
from spectraformer_jax.study.approximation.inputs import Inputs
from spectraformer_jax.typing import Array, FeatureVariables, PyTree

FOLDER = "layers"
SETTINGS = "settings"
# Options of `fit_feature_map` on which the result depends, beside the arrays.
OPTIONS = (
  "steps",
  "rows",
  "batch_size",
  "learning_rate",
  "loss",
  "scale",
  "is_causal",
  "window",
  "num_sinks",
  "num_heavy",
  "target",
)


def path_of(out: Path, name: str) -> Path:
  """Returns the file of a layer."""
  return out / FOLDER / f"{name}.npz"


def settings_of(
  fitted: Inputs,
  held_out: Inputs,
  feature_map: FeatureMap,
  rng: Array,
  *,
  num_heads: int | None,
  **options: Any,
) -> dict[str, Any]:
  """Returns everything that a layer's fit depends on, as JSON values.

  Raises:
    ValueError: an option is unknown or has a wrong value.
  """
  defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(fit_feature_map).parameters.items()
    if name in OPTIONS
  }
  unknown = sorted(options.keys() - set(OPTIONS))
  if unknown:
    raise ValueError(
      f"unknown option {unknown[0]!r}; there are {', '.join(OPTIONS)}."
    )
  options = defaults | options
  exact = exact_keys_of(
    options["window"],
    options["num_sinks"],
    options["num_heavy"],
    is_causal=options["is_causal"],
  )
  if options["scale"] is not None:
    options["scale"] = float(options["scale"])
  settings = {
    "data": fitted.fingerprint,
    "held_out": held_out.fingerprint,
    "feature_map": repr(feature_map),
    "num_heads": num_heads or fitted.key.shape[2],
    "rng": jax.random.key_data(rng).tolist(),
    **options,
    "window": exact.window,
  }
  return json.loads(json.dumps(settings, default=lambda number: number.item()))


def read(out: Path, name: str, settings: dict[str, Any]) -> FittedLayer | None:
  """Reads a layer that is done; None if it is not.

  Raises:
    ValueError: the file is of other data or settings.
  """
  path = path_of(out, name)
  if not path.exists():
    return None
  stored, layer = load_layer(path)
  for key in settings:
    if stored.get(key) != settings[key]:
      raise ValueError(
        f"{str(path)!r} was fitted with {key}={stored.get(key)!r}, not "
        f"{settings[key]!r}: use another folder, or overwrite "
        "(overwrite=True, --overwrite)."
      )
  return layer


def load_layer(path: Path) -> tuple[dict[str, Any], FittedLayer]:
  """Reads the settings of a layer's fit, and the layer.

  Raises:
    ValueError: the file is not one that `write` has written.
  """
  try:
    with path.open("rb") as opened, np.load(opened) as file:
      stored = {name: file[name] for name in file.files}
    settings = json.loads(str(stored.pop(SETTINGS)))
    name = str(stored.pop("name"))
  # TypeError: an npy file gives an array, which is no context manager.
  except (ValueError, KeyError, EOFError, TypeError, BadZipFile) as error:
    raise ValueError(f"{str(path)!r} is not the file of a layer.") from error
  tree = _nested(stored)
  report = tree["report"]
  number = lambda key: report[key].item()
  return settings, FittedLayer(
    name,
    _variables(tree.get("variables", {})),
    _variables(tree.get("start", {})),
    FitReport(
      losses=report["losses"],
      checked_steps=report["checked_steps"],
      held_out=report["held_out"],
      uniform=number("uniform"),
      best_step=number("best_step"),
      learning_rate=number("learning_rate"),
    ),
  )


def write(out: Path, layer: FittedLayer, settings: dict[str, Any]) -> None:
  """Writes a layer; if that fails, no file of its name appears.

  The time of the fit is left out, so that equal fits give equal files.
  """
  path = path_of(out, layer.name)
  path.parent.mkdir(parents=True, exist_ok=True)
  report = layer.report._asdict()
  del report["seconds"]
  arrays: dict[str, Any] = {
    SETTINGS: np.array(json.dumps(settings)),
    "name": np.array(layer.name),
    **_flat("variables", layer.variables._asdict()),
    **_flat("start", layer.start._asdict()),
    **{f"report/{name}": np.asarray(x) for name, x in report.items()},
  }
  partial = path.with_name(f".{path.name}.partial")
  with partial.open("wb") as file:
    np.savez(file, **arrays)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def _flat(prefix: str, tree: PyTree) -> dict[str, np.ndarray]:
  """Returns the leaves of nested dictionaries, by path."""
  return {
    "/".join([prefix, *(str(part.key) for part in path)]): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
  """Returns nested dictionaries from leaves by path."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *folders, name = path.split("/")
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = leaf
  return tree


def _variables(tree: dict[str, Any]) -> FeatureVariables:
  """Returns the variables of a map; what has no leaves is empty."""
  part = lambda name: jax.tree.map(jnp.asarray, tree.get(name, {}))
  return FeatureVariables(part("params"), part("projection"))
