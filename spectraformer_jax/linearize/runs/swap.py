"""Puts fitted feature maps in the place of a model's exact attention."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.nn import from_config
from spectraformer_jax.nn.pretrained import Pretrained, variables_or_shapes
from spectraformer_jax.study.approximation.pair_spec import (
  Pair,
  split_options,
)
from spectraformer_jax.train.config import (
  Config,
  default_config,
  to_dict,
  validate,
)
from spectraformer_jax.train.step import state
from spectraformer_jax.train.step.optim import FEATURE_MAP
from spectraformer_jax.typing import FeatureVariables, PyTree

# The parts of a leaf's path that name a layer's attention.
_ENCODER, _ATTENTION = "encoder", "attention"
_PROJECTION = "projection"


class Conversion(NamedTuple):
  """A model whose attention was replaced.

  Attributes:
    config: of the run that such a model would be.
    state: its variables, before any step.
    model: the module.
  """

  config: Config
  state: state.TrainState
  model: from_config.Model

  @property
  def pretrained(self) -> Pretrained:
    """The model with its variables."""
    return Pretrained(self.model, dict(self.state.variables))


def spectral_config(
  config: Config, pair: Pair, num_features: int | None, exact: ExactKeys
) -> Config:
  """Returns the config of a run with this pair in the place of its attention.

  Args:
    config: of the run.
    pair: of the feature map.
    num_features: M; None for a component that takes none.
    exact: keys that attention sees exactly.

  Raises:
    ValueError: a name or an option is wrong.
  """
  component, component_kwargs = split_options(pair.component)
  matrix, matrix_kwargs = split_options(pair.matrix)
  spectral = default_config()
  spectral.update(to_dict(config))
  spectral.model.attention = "spectral"
  spectral.model.attention_kwargs = {}
  spectral.model.update(exact._asdict())
  spectral.feature_map.component = component
  spectral.feature_map.weight_matrix = matrix
  spectral.feature_map.num_features = num_features
  spectral.feature_map.redraw_interval = 0
  spectral.feature_map.component_kwargs = component_kwargs
  spectral.feature_map.weight_matrix_kwargs = matrix_kwargs
  validate(spectral)
  return spectral


def swap(
  teacher: Pretrained,
  config: Config,
  facts: Mapping[str, Any],
  maps: Mapping[str, FeatureVariables],
) -> Conversion:
  """Replaces exact attention by feature maps; all else stays.

  Args:
    teacher: the trained model.
    config: of the converted run, from `spectral_config`.
    facts: of its data, from config.json.
    maps: variables of the feature map of each layer, by the names that
      `study.approximation.capture` gives to layers.

  Raises:
    ValueError: a leaf of the new model is in no map and not in the teacher,
      or has another shape there, or a leaf of the teacher has no place.
  """
  feature_map = from_config.make_feature_map(config)
  model = from_config.make_model(config, feature_map, facts)
  wanted = variables_or_shapes(model, feature_map)
  found = _by_path(teacher.variables)
  left = set(found)

  def choose(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
    names = _names(path)
    source = _of_map(names, maps)
    if source is None:
      left.discard(names)
      source = found.get(names)
    shape = None if source is None else np.shape(source)
    if source is None or shape != leaf.shape:
      raise ValueError(
        f"{'/'.join(names)} of the converted model needs shape {leaf.shape}, "
        f"and the teacher or the fit has {shape}."
      )
    return np.asarray(source, leaf.dtype)

  variables = jax.tree_util.tree_map_with_path(choose, wanted)
  if left:
    raise ValueError(
      f"{'/'.join(min(left))} of the teacher has no place in the converted "
      "model."
    )
  params = variables.pop("params")
  converted = state.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    collections=variables,
    opt_state=optax.EmptyState(),
    ema=None,
  )
  return Conversion(config, converted, model)


def _of_map(
  names: tuple[str, ...], maps: Mapping[str, FeatureVariables]
) -> Any | None:
  """Returns a leaf of a layer's feature map; None for any other leaf."""
  collection, *inner = names
  place = FEATURE_MAP if collection == "params" else _PROJECTION
  if collection not in ("params", "random_features") or place not in inner:
    return None
  end = inner.index(place)
  name = "/".join(
    part for part in inner[:end] if part not in (_ENCODER, _ATTENTION)
  )
  if name not in maps:
    return None
  variables = maps[name]
  tree = variables.params if collection == "params" else variables.projection
  return _by_path(tree).get(tuple(inner[end + 1 :]))


def _by_path(tree: PyTree) -> dict[tuple[str, ...], Any]:
  return {
    _names(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(entry.key for entry in path)
