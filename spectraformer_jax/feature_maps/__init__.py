"""Feature maps: a component function f on the rows of a weight matrix W."""

from spectraformer_jax.feature_maps.compose import (
  compose,
  feature_map,
  list_feature_maps,
)
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.trainable import trainable

__all__ = [
  "FeatureMap",
  "compose",
  "feature_map",
  "list_feature_maps",
  "trainable",
]
