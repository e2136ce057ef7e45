"""The feature map and the model that a config describes."""

import jax.numpy as jnp
from ml_collections import ConfigDict

import spectraformer_jax as sf
from spectraformer_jax import nn
from spectraformer_jax.baselines import check_options
from spectraformer_jax.data import Batches
from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.train import objectives

Model = (
  nn.Classifier | nn.DualClassifier | nn.LanguageModel | nn.MaskedLanguageModel
)


def make_feature_map(config: ConfigDict) -> FeatureMap | None:
  """The pair of the config; None for a baseline.

  Raises:
    ValueError: unknown component or matrix, an option it or the baseline does
      not have, or a redraw interval for a matrix that cannot be redrawn.

  Example:
    >>> from spectraformer_jax.train.config import default_config
    >>> make_feature_map(default_config()).info.name
    'oprf-orf'
  """
  check_options(config.model.attention, config.model.attention_kwargs.to_dict())
  if config.model.attention != "spectral":
    return None
  section = config.feature_map
  feature_map = sf.feature_map(
    section.component,
    section.weight_matrix,
    num_features=section.num_features,
    component_kwargs=section.component_kwargs.to_dict(),
    weight_matrix_kwargs=section.weight_matrix_kwargs.to_dict(),
  )
  if section.redraw_interval and not feature_map.weight_matrix.info.redrawable:
    raise ValueError(
      f"config.feature_map.redraw_interval must be 0 for weight matrix "
      f"{section.weight_matrix!r}, which cannot be redrawn, got "
      f"{section.redraw_interval}."
    )
  return feature_map


def make_model(
  config: ConfigDict, feature_map: FeatureMap | None, batches: Batches
) -> Model:
  """The model for a task: a classifier, of pairs if its examples are pairs.

  With another `train.objective` than "classify" a language model.

  Args:
    config: its model section, where vocab_size and max_len left at None are
      the data's, and train.precision and train.remat.
    feature_map: of `make_feature_map`.
    batches: what the model is to read.

  Raises:
    ValueError: a vocabulary or length smaller than the data needs.
  """
  section, dataset = config.model, batches.dataset
  objective = config.train.objective
  # Hidden tokens have an id of their own, the last.
  vocab_size = dataset.vocab_size + (objective == "masked")
  sizes = {"vocab_size": vocab_size, "max_len": batches.length}
  for name, needed in sizes.items():
    given = section[name]
    if given is not None and given < needed:
      raise ValueError(
        f"config.model.{name} must be at least {needed} for task "
        f"{dataset.name!r}, got {given}."
      )
    sizes[name] = given or needed
  if objective == "classify":
    sizes |= {"num_classes": dataset.num_classes, "pooling": section.pooling}
  return objectives.model_class(objective, dataset.pair)(
    feature_map=feature_map,
    attention=section.attention,
    attention_kwargs=section.attention_kwargs.to_dict(),
    embed_dim=section.embed_dim,
    num_layers=section.num_layers,
    num_heads=section.num_heads,
    head_dim=section.head_dim,
    mlp_dim=section.mlp_dim,
    dropout_rate=section.dropout_rate,
    positions=section.positions,
    mlp=section.mlp,
    norm=section.norm,
    # Parameters, statistics, feature sums and the head stay float32.
    dtype=jnp.bfloat16 if config.train.precision == "bfloat16" else None,
    remat=config.train.remat,
    **sizes,
  )
