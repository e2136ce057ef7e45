"""Checks of the arguments of `spectral_attention`."""

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.prepared import check_stats
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  PyTree,
  SegmentIds,
)


def check_spectral_inputs(
  arrays: checks.AttentionArrays,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree,
  is_causal: bool,
  has_state: bool = False,
) -> None:
  """Raises ValueError unless `spectral_attention` can use these arguments."""
  checks.check_bool("is_causal", is_causal)
  check_statistics(feature_map, stats, is_causal, arrays.segment_ids, has_state)
  feature_map.check_inputs(variables, arrays.key)
  length = max(arrays.query.shape[1], arrays.key.shape[1])
  feature_map.component.check_length(length)


def check_stats_of_map(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree,
  key: Array,
) -> None:
  """Raises ValueError unless `stats` have the shapes of this map's stats."""
  if not jax.tree.leaves(stats):
    return
  check_stats(stats, key)
  abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  x = jax.ShapeDtypeStruct((1, 2, *key.shape[2:]), jnp.float32)
  expected = jax.eval_shape(
    lambda variables, x: feature_map.calibrate(variables, x, x),
    jax.tree.map(abstract, variables),
    x,
  )
  got, want = (
    jax.tree.map(lambda leaf: leaf.shape[2:], tree)
    for tree in (stats, expected)
  )
  if got != want:
    raise ValueError(
      f"stats are not those of {feature_map.info.name!r}: after batch and "
      f"heads their shapes are {got}, not {want}; pass what its calibrate "
      "returns."
    )


def check_statistics(
  feature_map: FeatureMap,
  stats: PyTree,
  is_causal: bool,
  segment_ids: SegmentIds | None,
  has_state: bool,
) -> None:
  """Raises ValueError if a query's features would depend on hidden tokens."""
  component = feature_map.component
  name = component.info.name
  if is_causal and not component.info.causal_safe:
    raise ValueError(
      f"component {name!r} cannot be causal: its features depend on other "
      "positions."
    )
  if segment_ids is not None and component.info.positional:
    raise ValueError(
      f"component {name!r} counts positions from the start of the row, not of "
      "each segment: it cannot be combined with segment_ids."
    )
  if stats is not None or not feature_map.info.needs_stats:
    return
  if is_causal:
    setting, effect = "is_causal=True", "leak the future"
  elif segment_ids is not None:
    setting, effect = "segment_ids", "mix segments"
  elif has_state:
    setting, effect = "a state", "treat each call differently"
  else:
    return
  if component.needs_stats:
    raise ValueError(
      f"{setting} with component {name!r} would compute statistics from the "
      f"whole sequence and {effect}: pass stats, or build it with statistics="
      "'learned' or 'constant' (in sf.nn also 'ema')."
    )
  raise ValueError(
    f"{setting} with weight matrix {feature_map.weight_matrix.info.name!r} "
    f"would take its context from the whole sequence and {effect}: build it "
    "with context='learned', or pass stats."
  )
