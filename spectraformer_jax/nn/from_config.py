"""Makes the feature map and the model that a training run's config names."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax import feature_maps
from spectraformer_jax.baselines import check_options
from spectraformer_jax.feature_maps.compose import takes_num_features
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.nn import exact_keys
from spectraformer_jax.nn.classifier import Classifier
from spectraformer_jax.nn.config import field_names
from spectraformer_jax.nn.dual_classifier import DualClassifier
from spectraformer_jax.nn.language_model import (
  LanguageModel,
  MaskedLanguageModel,
)
from spectraformer_jax.typing import Array

Model = Classifier | DualClassifier | LanguageModel | MaskedLanguageModel
# A `ConfigDict`, from a file or a workdir; type checkers do not know its keys.
Config = Any


def make_feature_map(config: Config) -> FeatureMap | None:
  """Makes the feature map of `config`; None unless attention is "spectral".

  The config's num_features has no effect on a component whose number of
  features head_dim sets, such as "elu1".

  Raises:
    ValueError: an unknown component or matrix; an option that the component,
      matrix or baseline does not have or cannot use; a redraw interval for a
      matrix that cannot be redrawn; or exact keys (`model.window`,
      `model.num_sinks`, `model.num_heavy`) that the attention cannot have.

  Example:
    >>> from spectraformer_jax.train.config import default_config
    >>> make_feature_map(default_config()).info.name
    'oprf-orf'
  """
  model = config.model
  check_options(model.attention, model.attention_kwargs.to_dict())
  feature_map = None
  if model.attention == "spectral":
    feature_map = _spectral_map(config.feature_map)
  # A config of an earlier version may lack these keys.
  defaults = ExactKeys._field_defaults
  exact_keys.check_options(
    {name: model.get(name, defaults[name]) for name in exact_keys.OPTIONS},
    model.attention,
    feature_map,
    is_causal=_objective(config) == "causal",
  )
  return feature_map


def _spectral_map(section: Config) -> FeatureMap:
  """Makes the feature map of the section `feature_map`."""
  options = {
    name: _hashable(section[name].to_dict())
    for name in ("component_kwargs", "weight_matrix_kwargs")
  }
  try:
    takes_num = takes_num_features(
      section.component, options["component_kwargs"]
    )
    feature_map = feature_maps.feature_map(
      section.component,
      section.weight_matrix,
      num_features=section.num_features if takes_num else None,
      **options,
    )
  except TypeError as error:  # from the value of an option
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
  """Replaces lists, of a command line or a file, by hashable tuples."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in options.items()
  }


def make_model(
  config: Config,
  feature_map: FeatureMap | None,
  facts: Mapping[str, Any],
) -> Model:
  """Makes the model for a task.

  If `train.objective` is "classify", it is a classifier (of pairs, if the
  task's examples are pairs); otherwise it is a language model.

  Args:
    config: the function reads its section `model` (a vocab_size or max_len of
      None means that of the data), task.pad_to_multiple, train.objective,
      train.precision and train.remat.
    feature_map: from `make_feature_map`.
    facts: name, vocab_size, num_classes, length and pair of the data, as in
      `data.Facts`.

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
  objective = _objective(config)
  kind = _model_class(objective, facts["pair"])
  # config.model holds other keys as well, such as init_from.
  fields = field_names(kind)
  options = _hashable(
    {k: v for k, v in config.model.to_dict().items() if k in fields}
  )
  if objective == "classify":
    options["num_classes"] = facts["num_classes"]
  # A masked language model has one more id, the last: that of the mask token.
  vocab_size = facts["vocab_size"] + (objective == "masked")
  # Batches are padded to this length.
  multiple = config.task.pad_to_multiple
  length = -(-facts["length"] // multiple) * multiple
  for name, needed in (("vocab_size", vocab_size), ("max_len", length)):
    if options[name] is None:
      options[name] = needed
    elif options[name] < needed:
      raise ValueError(
        f"config.model.{name} must be at least {needed} for task "
        f"{facts['name']!r}, got {options[name]}."
      )
  return kind(
    feature_map=feature_map,
    # The dtype of activations: parameters, statistics, sums and the head stay
    # float32.
    dtype=jnp.bfloat16 if config.train.precision == "bfloat16" else None,
    remat=config.train.remat,
    **options,
  )


def _objective(config: Config) -> str:
  """Returns train.objective, which a config of an earlier version may lack."""
  return config.train.get("objective", "classify")


def _model_class(objective: str, pair: bool) -> type[Model]:
  """Returns the class for an objective; a language model takes no pairs."""
  if objective == "classify":
    return DualClassifier if pair else Classifier
  return {"masked": MaskedLanguageModel, "causal": LanguageModel}[objective]


def example_inputs(model: nn.Module) -> tuple[Array, ...]:
  """Returns the smallest inputs with which a model can be initialised."""
  inputs = jnp.ones((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
  return inputs * 2 if isinstance(model, DualClassifier) else inputs
