"""Builders of feature maps, and the pairs of component and matrix that fit."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.components import COMPONENTS, Component, build_component
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.weight_matrices import WEIGHT_MATRICES, WeightMatrix


def feature_map(
  component: str,
  weight_matrix: str,
  *,
  num_features: int | None,
  component_kwargs: Mapping[str, Any] | None = None,
  weight_matrix_kwargs: Mapping[str, Any] | None = None,
) -> FeatureMap:
  """Builds a feature map by name.

  Args:
    component: a name of `list_components`.
    weight_matrix: a name of `list_weight_matrices`.
    num_features: M, per head; None for a component whose number of features
      head_dim sets, such as "elu1".
    component_kwargs: options of the component.
    weight_matrix_kwargs: options of the weight matrix.

  Returns:
    A `FeatureMap`; equal arguments give the same object.

  Raises:
    ValueError: unknown name or option (the message has the nearest known one),
      an option's bad value, or a pair that does not fit.

  Example:
    >>> fm = feature_map("oprf", "orf", num_features=128)
    >>> fm is feature_map("oprf", "orf", num_features=128)
    True
  """
  return compose(
    build_component(component, component_kwargs),
    WEIGHT_MATRICES.build(weight_matrix, weight_matrix_kwargs),
    num_features=num_features,
  )


def compose(
  component: Component,
  weight_matrix: WeightMatrix,
  *,
  num_features: int | None,
) -> FeatureMap:
  """Builds a feature map from objects: your own, or the package's.

  Args:
    component: f.
    weight_matrix: W.
    num_features: M, per head; None for a component whose number of features
      head_dim sets, such as "elu1".

  Returns:
    A `FeatureMap`; equal arguments give the same object.

  Raises:
    ValueError: num_features is not a positive integer, or the pair does not
      fit (the message has the reason).

  Warns:
    UserWarning: once per pair, if the matrix holds rows and their negatives and
      the component maps both alike, so that half of the rows are wasted.

  Example:
    >>> from spectraformer_jax import components, weight_matrices
    >>> f = components.OPRF(statistics="constant")
    >>> compose(f, weight_matrices.ORF(), num_features=64).info.name
    'oprf-orf'
  """
  reason = mismatch(component, weight_matrix)
  if reason:
    raise ValueError(reason)
  if component.info.takes_num_features:
    check_positive_int("num_features", num_features)
  elif num_features is not None:
    raise ValueError(
      f"component {component.info.name!r} has no rows, so num_features must "
      f"be None, got {num_features!r}."
    )
  return _compose(component, weight_matrix, num_features)


@functools.cache
def _compose(
  component: Component, weight_matrix: WeightMatrix, num_features: int | None
) -> FeatureMap:
  """Builds the pair; cached: equal arguments give one object, one warning."""
  f, w = component.info, weight_matrix.info
  if f.even and w.antithetic:
    warnings.warn(
      f"{f.name}-{w.name} has the variance of half as many rows: component "
      f"{f.name!r} maps a row and its negative alike, and weight matrix "
      f"{w.name!r} holds both; use 'orf', which does not.",
      stacklevel=3,
    )
  return FeatureMap(component, weight_matrix, num_features)


def takes_num_features(
  component: str, component_kwargs: Mapping[str, Any] | None = None
) -> bool:
  """Whether maps with this component need a number of features.

  Args:
    component: a name of `list_components`.
    component_kwargs: its options.

  Raises:
    ValueError: unknown name or option, or an option's bad value.

  Example:
    >>> takes_num_features("prototypes"), takes_num_features("elu1")
    (True, False)
  """
  built = build_component(component, component_kwargs)
  return built.info.takes_num_features


def mismatch(component: Component, weight_matrix: WeightMatrix) -> str | None:
  """Returns the reason why this pair cannot work, in one line, or None."""
  f, w = component.info, weight_matrix.info
  if f.row_law not in w.row_laws:
    return (
      f"component {f.name!r} needs rows of law {f.row_law!r}, weight matrix "
      f"{w.name!r} makes {', '.join(w.row_laws)}."
    )
  if w.trig_only and f.family != "trigonometric":
    return (
      f"weight matrix {w.name!r} has heavy tails: only trigonometric "
      f"components have finite variance with it, not {f.name!r}."
    )
  return None


def list_feature_maps() -> tuple[tuple[str, str], ...]:
  """Returns the names (component, weight matrix) of all pairs that fit, sorted.

  All have default options; an option can make more or fewer pairs fit.

  Example:
    >>> pairs = list_feature_maps()
    >>> ("oprf", "orf") in pairs, ("oprf", "none") in pairs
    (True, False)
  """
  matrices = {n: WEIGHT_MATRICES.build(n) for n in WEIGHT_MATRICES.names()}
  return tuple(
    (name, matrix_name)
    for name in COMPONENTS.names()
    for matrix_name, matrix in matrices.items()
    if mismatch(COMPONENTS.build(name), matrix) is None
  )
