"""The feature map and the model that a config describes.

The config is that of a training run, from its file or from its workdir.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from spectraformer_jax import feature_maps
from spectraformer_jax.baselines import check_options
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.classifier import Classifier
from spectraformer_jax.nn.dual_classifier import DualClassifier
from spectraformer_jax.nn.language_model import (
  LanguageModel,
  MaskedLanguageModel,
)
from spectraformer_jax.typing import Array

Model = Classifier | DualClassifier | LanguageModel | MaskedLanguageModel


def make_feature_map(config: ConfigDict) -> FeatureMap | None:
  """The pair of the config; None for a baseline.

  A pair without weight matrix ("none") has no num_features, whatever the config
  says.

  Raises:
    ValueError: unknown component or matrix, an option it or the baseline does
      not have or cannot use, or a redraw interval for a matrix that cannot be
      redrawn.

  Example:
    >>> from spectraformer_jax.train.config import default_config
    >>> make_feature_map(default_config()).info.name
    'oprf-orf'
  """
  check_options(config.model.attention, config.model.attention_kwargs.to_dict())
  if config.model.attention != "spectral":
    return None
  section = config.feature_map
  options = {
    name: _hashable(section[name].to_dict())
    for name in ("component_kwargs", "weight_matrix_kwargs")
  }
  try:
    feature_map = feature_maps.feature_map(
      section.component,
      section.weight_matrix,
      num_features=None
      if section.weight_matrix == "none"
      else section.num_features,
      **options,
    )
  except TypeError as error:  # of an option's value
    raise ValueError(
      f"config.feature_map of {section.component!r} and "
      f"{section.weight_matrix!r} cannot use one of the options {options}: "
      f"{error}"
    ) from error
  redrawable = (
    feature_map.num_rows and feature_map.weight_matrix.info.redrawable
  )
  if section.redraw_interval and not redrawable:
    raise ValueError(
      f"config.feature_map.redraw_interval must be 0 for weight matrix "
      f"{section.weight_matrix!r}, which cannot be redrawn, got "
      f"{section.redraw_interval}."
    )
  return feature_map


def _hashable(options: Mapping[str, Any]) -> dict[str, Any]:
  """With tuples for lists, which a command line gives."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in options.items()
  }


def make_model(
  config: ConfigDict,
  feature_map: FeatureMap | None,
  facts: Mapping[str, Any],
) -> Model:
  """The model for a task: a classifier, of pairs if its examples are pairs.

  With another `train.objective` than "classify" a language model.

  Args:
    config: its section model, where vocab_size and max_len left at None are
      the data's; task's pad_to_multiple; train's precision and remat.
    feature_map: of `make_feature_map`.
    facts: of the data: name, vocab_size, num_classes, length and pair, as
      `data.Facts` has them.

  Raises:
    ValueError: a vocabulary or length smaller than the data needs.

  Example:
    >>> from spectraformer_jax.train.config import default_config
    >>> config = default_config()
    >>> facts = {"name": "toy", "vocab_size": 8, "num_classes": 2, "length": 5,
    ...   "pair": False}
    >>> make_model(config, make_feature_map(config), facts).max_len
    5
  """
  # A key that a config does not have yet has its default's effect.
  objective = config.train.get("objective", "classify")
  kind = _model_class(objective, facts["pair"])
  attributes = {field.name for field in dataclasses.fields(kind)}
  # What else the section may hold is not about the model's form.
  options = {k: v for k, v in config.model.to_dict().items() if k in attributes}
  if objective == "classify":
    options["num_classes"] = facts["num_classes"]
  # Hidden tokens have an id of their own, the last.
  vocab_size = facts["vocab_size"] + (objective == "masked")
  # Batches are padded to this length.
  multiple = config.task.pad_to_multiple
  length = -(-facts["length"] // multiple) * multiple
  for name, needed in (
    ("vocab_size", vocab_size),
    ("max_len", length),
  ):
    if options[name] is None:
      options[name] = needed
    elif options[name] < needed:
      raise ValueError(
        f"config.model.{name} must be at least {needed} for task "
        f"{facts['name']!r}, got {options[name]}."
      )
  return kind(
    feature_map=feature_map,
    # Parameters, statistics, feature sums and the head stay float32.
    dtype=jnp.bfloat16 if config.train.precision == "bfloat16" else None,
    remat=config.train.remat,
    **options,
  )


def _model_class(objective: str, pair: bool) -> type[Model]:
  """What learns it; pairs are guessed one sequence at a time."""
  if objective == "classify":
    return DualClassifier if pair else Classifier
  return {"masked": MaskedLanguageModel, "causal": LanguageModel}[objective]


def example_inputs(model: Model) -> tuple[Array, ...]:
  """What a model can be initialised with: shapes of variables need no more."""
  inputs = jnp.ones((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
  return inputs * 2 if isinstance(model, DualClassifier) else inputs
