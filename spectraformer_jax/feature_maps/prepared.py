"""Records and helpers of feature maps: facts, prepared rows, row weights."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.components import Component, ComponentState
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  LogFeatures,
  Projection,
  PyTree,
  Side,
  WeightSample,
)
from spectraformer_jax.weight_matrices import WeightMatrix


@dataclasses.dataclass(frozen=True)
class FeatureMapInfo:
  """Static facts about a pair.

  Attributes:
    name: "component-matrix".
    positive: features are never negative (component and row weights).
    unbiased: the estimate's mean is exactly the kernel (exact or weighted
      marginals); otherwise see the matrix's docstring for the bias.
    learnable: the weight matrix has trainable parameters, so there is no fixed
      kernel to compare with.
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


def as_variables(variables) -> FeatureVariables:
  """The variables as `FeatureMap.init` makes them.

  Args:
    variables: `FeatureVariables`, a pair, or a mapping with "params" and
      "projection", as checkpoints restore it; an empty part may be missing.

  Raises:
    ValueError: anything else.
  """
  if isinstance(variables, FeatureVariables):
    return variables
  names = set(FeatureVariables._fields)
  if isinstance(variables, Mapping) and variables.keys() <= names:
    parts = [variables.get(name) for name in FeatureVariables._fields]
    return FeatureVariables(*(part or {} for part in parts))
  if isinstance(variables, tuple | list) and len(variables) == 2:
    return FeatureVariables(*(part or {} for part in variables))
  raise ValueError(
    "variables must be FeatureVariables(params, projection), as "
    f"feature_map.init makes them, got {type(variables).__name__}."
  )


def weigh_rows(
  out: LogFeatures, rows: WeightSample, side: Side, num_features: int | None
) -> LogFeatures:
  """Adds 1/sqrt(M) and row weights; signs go to the query side alone."""
  if num_features is None:
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
    factor = jnp.broadcast_to(sign, (*log_magnitude.shape[:-1], size)) * (
      1.0 if factor is None else factor
    )
  return LogFeatures(log_magnitude, factor)


def cast_floats(tree: PyTree, dtype) -> PyTree:
  """Floats as `dtype`; other leaves as they are."""
  return jax.tree.map(
    lambda leaf: (
      leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    ),
    tree,
  )


def store(projection: Projection, dtype) -> Projection:
  """Drawn leaves as they are kept: floats, so that all have a gradient.

  Integers are float32, which is exact below 2**24, and so are log-weights: to
  round one is to change the weight of its row in every estimate.
  """

  def kept(path, leaf):
    exact = not jnp.issubdtype(leaf.dtype, jnp.floating)
    exact |= jax.tree_util.keystr(path[-1:], simple=True) == "log_weight"
    return leaf.astype(jnp.float32 if exact else dtype)

  return jax.tree_util.tree_map_with_path(kept, projection)


def cast_like(projection: Projection, variables: FeatureVariables):
  """The projection in the dtypes of that of the variables."""
  return jax.tree.map(
    lambda new, old: new.astype(old.dtype), projection, variables.projection
  )


def drop_empty(**parts) -> dict[str, PyTree]:
  """The parts that have leaves."""
  return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def mean_over_examples(tree: PyTree, counts: Array) -> PyTree:
  """Means over axis 0, kept, of the rows where `counts` ``[B]`` is True."""
  weights = counts.astype(jnp.float32) / jnp.maximum(jnp.sum(counts), 1).astype(
    jnp.float32
  )

  def mean(leaf):
    shape = (-1,) + (1,) * (leaf.ndim - 1)
    weight = jnp.reshape(weights, shape).astype(leaf.dtype)
    kept = jnp.where(jnp.reshape(counts, shape), leaf, 0.0)
    return jnp.sum(weight * kept, axis=0, keepdims=True)

  return jax.tree.map(mean, tree)


def check_stats(stats, x):
  """ValueError unless leaves of stats lead with [B, N] of x, or ones."""
  batch, heads = x.shape[0], x.shape[2]
  for leaf in jax.tree.leaves(stats):
    if leaf.ndim < 2 or not (
      leaf.shape[0] in (1, batch) and leaf.shape[1] in (1, heads)
    ):
      raise ValueError(
        f"stats must lead with [batch, heads] = [{batch}, {heads}] (or ones), "
        f"got a leaf of shape {leaf.shape}."
      )


def check_sizes(feature_map, head_dim: int, num_heads: int) -> None:
  """ValueError for sizes that this pair cannot make."""
  check_positive_int("head_dim", head_dim)
  check_positive_int("num_heads", num_heads)
  component = feature_map.component
  component.check(feature_map.num_features, head_dim)
  num_rows = feature_map.num_rows // component.row_draws
  feature_map.weight_matrix.check(num_rows, head_dim)


def check_x(
  component: Component, variables: FeatureVariables, x: Array
) -> None:
  """ValueError unless x has the axes, the length and the heads it needs."""
  if x.ndim < 3:
    raise ValueError(
      "x must be [..., length, heads, head_dim], got "
      f"x.shape={x.shape}; reshape to add the missing axes."
    )
  component.check_length(x.shape[-3])
  for leaf in jax.tree.leaves(variables):
    if leaf.shape[0] not in (1, x.shape[-2]):
      raise ValueError(
        f"variables hold {leaf.shape[0]} heads but x.shape={x.shape} has "
        f"{x.shape[-2]}: init with num_heads={x.shape[-2]}, or 1 to share."
      )


def check_head_dim(head_dim: int, x: Array) -> None:
  """ValueError unless x has the head_dim of the rows."""
  if head_dim != x.shape[-1]:
    raise ValueError(
      f"variables were made for head_dim={head_dim} but x.shape={x.shape} "
      f"has {x.shape[-1]}."
    )


def check_has_stats(feature_map, stats: PyTree) -> None:
  """ValueError unless the stats that a feature map needs are there."""
  component, matrix = feature_map.component, feature_map.weight_matrix
  if component.needs_stats and not stats:
    raise ValueError(
      f"component {component.info.name!r} with statistics="
      f"{component.statistics!r} needs stats: pass stats=fm.calibrate("
      "variables, query, key), or build it with statistics='constant' or "
      "'learned'."
    )
  if matrix.needs_stats and "rows" not in (stats or {}):
    raise ValueError(
      f"weight matrix {matrix.info.name!r} needs the context of "
      "a sequence: pass stats=fm.calibrate(variables, query, key), or build "
      "it with context='learned'."
    )


def check_redrawable(weight_matrix: WeightMatrix) -> None:
  """ValueError unless the matrix can be redrawn."""
  if not weight_matrix.info.redrawable:
    raise ValueError(
      f"weight matrix {weight_matrix.info.name!r} cannot be redrawn: its rows "
      "are fixed once it is initialised."
    )
