"""What `spectral_attention` refuses, in words."""

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.feature_maps.prepared import check_stats


def check_spectral_inputs(
  query,
  key,
  value,
  *,
  feature_map,
  variables,
  stats,
  is_causal,
  key_mask,
  query_mask,
  segment_ids=None,
  has_state=False,
) -> None:
  """ValueError unless `spectral_attention` can be given these arguments."""
  checks.check_bool("is_causal", is_causal)
  checks.check_attention_inputs(query, key, value)
  checks.check_key_mask(key_mask, key)
  checks.check_key_mask(query_mask, query, "query_mask")
  check_statistics(feature_map, stats, is_causal, segment_ids, has_state)
  feature_map.check_inputs(variables, key)
  feature_map.component.check_length(query.shape[1])


def check_stats_of_map(feature_map, variables, stats, key) -> None:
  """ValueError unless `stats` have the form that this map gives them."""
  if not jax.tree.leaves(stats):
    return
  check_stats(stats, key)
  of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  x = jax.ShapeDtypeStruct((1, 2, *key.shape[2:]), jnp.float32)
  expected = jax.eval_shape(
    lambda variables, x: feature_map.calibrate(variables, x, x),
    jax.tree.map(of, variables),
    x,
  )
  shapes = [
    jax.tree.map(lambda leaf: leaf.shape[2:], tree)
    for tree in (stats, expected)
  ]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f"stats are not those of {feature_map.info.name!r}: after batch and "
      f"heads their shapes are {shapes[0]}, not {shapes[1]}; pass what its "
      "calibrate returns."
    )


def check_statistics(
  feature_map, stats, is_causal, segment_ids, has_state
) -> None:
  """ValueError where features would depend on what a query must not see."""
  component = feature_map.component
  name = component.info.name
  if is_causal and not component.info.causal_safe:
    raise ValueError(
      f"component {name!r} cannot be causal: its features depend on other "
      "positions."
    )
  if segment_ids is not None and component.info.positional:
    raise ValueError(
      f"component {name!r} counts positions of the whole row, so it cannot be "
      "combined with segment_ids."
    )
  if stats is not None or not feature_map.info.needs_stats:
    return
  leak = None
  if is_causal:
    leak = "is_causal=True", "leak the future"
  elif segment_ids is not None:
    leak = "segment_ids", "mix packed rows"
  elif has_state:
    leak = "a state", "differ from those of its other calls"
  if leak and component.needs_stats:
    raise ValueError(
      f"{leak[0]} with component {name!r} would compute statistics from the "
      f"whole sequence and {leak[1]}: build it with statistics='ema', "
      "'learned' or 'constant', or pass stats."
    )
  if leak:
    raise ValueError(
      f"{leak[0]} with weight matrix {feature_map.weight_matrix.info.name!r} "
      f"would take its context from the whole sequence and {leak[1]}: build it "
      "with context='learned', or pass stats."
    )
