"""Records and helpers of feature maps: facts, prepared rows, row weights."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import (
  Array,
  ComponentState,
  FeatureVariables,
  LogFeatures,
  Projection,
  PyTree,
  Side,
  WeightSample,
)


@dataclasses.dataclass(frozen=True)
class FeatureMapInfo:
  """Static facts about a pair of component and weight matrix.

  Attributes:
    name: "component-matrix".
    positive: features are never negative, signs of the rows included.
    unbiased: the mean of the estimate is exactly the kernel (exact or weighted
      marginals); otherwise the matrix's docstring gives the bias, or the
      component learns its kernel.
    learnable: the weight matrix or the component is learnt, so there is no
      fixed kernel to compare with.
    needs_stats: features need data-dependent `stats`.
  """

  name: str
  positive: bool
  unbiased: bool
  learnable: bool
  needs_stats: bool


class Prepared(NamedTuple):
  """Rows and component state per example and head; see `FeatureMap.prepare`."""

  rows: WeightSample
  state: ComponentState


def as_variables(variables: Any) -> FeatureVariables:
  """Converts variables to the form that `FeatureMap.init` returns.

  Args:
    variables: `FeatureVariables`, a pair, or a mapping with "params" and
      "projection", as checkpoints restore it; an empty part may be missing.

  Raises:
    ValueError: anything else.
  """
  if isinstance(variables, FeatureVariables):
    return variables
  names = FeatureVariables._fields
  if isinstance(variables, Mapping) and variables.keys() <= set(names):
    return FeatureVariables(*(variables.get(name) or {} for name in names))
  if isinstance(variables, tuple | list) and len(variables) == 2:
    return FeatureVariables(*(part or {} for part in variables))
  raise ValueError(
    "variables must be FeatureVariables(params, projection), as "
    f"feature_map.init makes them, got {type(variables).__name__}."
  )


def component_state(
  variables: FeatureVariables, stats: PyTree
) -> ComponentState:
  """Returns the component's part of the variables and stats of one head."""
  return ComponentState(
    variables.params.get("component", {}),
    jax.lax.stop_gradient(variables.projection.get("component", {})),
    (stats or {}).get("component", ()),
  )


def weigh_rows(
  out: LogFeatures, rows: WeightSample, side: Side, num_features: int | None
) -> LogFeatures:
  """Multiplies by sqrt(row weight / M); signs multiply queries only.

  Without rows, features stay as they are.
  """
  if num_features is None or not rows.w.shape[0]:
    return out
  log_magnitude = out.log_magnitude - 0.5 * math.log(num_features)
  factor = out.factor
  if rows.log_weight is None and rows.sign is None:
    return LogFeatures(log_magnitude, factor)
  size = log_magnitude.shape[-1] if factor is None else factor.shape[-1]
  copies = size // rows.w.shape[0]
  if rows.log_weight is not None:
    log_magnitude += 0.5 * jnp.tile(rows.log_weight, copies)[None, :]
  if rows.sign is not None and side == "query":
    sign = jnp.tile(rows.sign, copies)[None, :]
    sign = jnp.broadcast_to(sign, (*log_magnitude.shape[:-1], size))
    factor = sign if factor is None else sign * factor
  return LogFeatures(log_magnitude, factor)


def cast_floats(tree: PyTree, dtype: Any) -> PyTree:
  """Casts floats to `dtype` and leaves other leaves as they are."""
  return jax.tree.map(
    lambda leaf: (
      leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    ),
    tree,
  )


def store(projection: Projection, dtype: Any) -> Projection:
  """Casts drawn leaves to floats, so that variables suit `jax.grad`.

  Integers become float32, which is exact below 2**24. Log-weights become
  float32, too: rounding one would change the weight of its row everywhere.
  """

  def cast(path: tuple, leaf: Array) -> Array:
    is_exact = not jnp.issubdtype(leaf.dtype, jnp.floating)
    is_exact |= jax.tree_util.keystr(path[-1:], simple=True) == "log_weight"
    return leaf.astype(jnp.float32 if is_exact else dtype)

  return jax.tree_util.tree_map_with_path(cast, projection)


def drop_empty(**parts: PyTree) -> dict[str, PyTree]:
  """Returns the parts that have leaves."""
  return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def mean_over_examples(tree: PyTree, is_counted: Array) -> PyTree:
  """Returns means over axis 0 (kept), of examples where `is_counted` [B]."""
  num_examples = jnp.maximum(jnp.sum(is_counted), 1).astype(jnp.float32)
  weights = is_counted.astype(jnp.float32) / num_examples

  def mean(leaf: Array) -> Array:
    shape = (-1,) + (1,) * (leaf.ndim - 1)
    weight = jnp.reshape(weights, shape).astype(leaf.dtype)
    leaf = jnp.where(jnp.reshape(is_counted, shape), leaf, 0.0)
    return jnp.sum(weight * leaf, axis=0, keepdims=True)

  return jax.tree.map(mean, tree)


def check_stats(stats: PyTree, x: Array) -> None:
  """Raises ValueError unless leaves lead with [B or 1, N or 1] of x."""
  batch, heads = x.shape[0], x.shape[2]
  for leaf in jax.tree.leaves(stats):
    if leaf.ndim < 2 or not (
      leaf.shape[0] in (1, batch) and leaf.shape[1] in (1, heads)
    ):
      raise ValueError(
        f"stats must lead with [batch, heads] = [{batch}, {heads}] (or ones), "
        f"got a leaf of shape {leaf.shape}."
      )
