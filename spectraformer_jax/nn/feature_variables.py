"""Variables of a feature map, and its running statistics, inside a module."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.vmap_heads import queries_by_key_head
from spectraformer_jax.typing import Array, FeatureVariables, PyTree

# At each training step, running statistics move by 1 - _STATS_DECAY of the way
# to those of the batch.
_STATS_DECAY = 0.99


def feature_variables(
  module: nn.Module, feature_map: FeatureMap, head_dim: int, num_heads: int
) -> FeatureVariables:
  """Gets or creates the learnable and the random leaves of a feature map.

  Learnable leaves are the parameter "feature_map"; random ones are the variable
  "projection" of the collection "random_features".

  Args:
    module: called from its compact method.
    feature_map: from `sf.feature_map` or `sf.compose`.
    head_dim: H.
    num_heads: N of the keys, or 1 to share the leaves among heads.

  Raises:
    ValueError: the collection "random_features" is missing and not mutable.
  """
  sizes = {"head_dim": head_dim, "num_heads": num_heads}
  collection = "random_features"
  if not (
    module.has_variable(collection, "projection")
    or module.is_mutable_collection(collection)
  ):
    raise ValueError(
      f"collection {collection!r} is missing: apply needs it beside 'params', "
      "and nn.scan and nn.vmap need it in variable_axes={'params': 0, "
      f"{collection!r}: 0}}."
    )
  projection = module.variable(
    collection,
    "projection",
    lambda: feature_map.init_projection(module.make_rng("features"), **sizes),
  )
  params = {}
  if feature_map.has_params:
    params = module.param(
      "feature_map", lambda rng: feature_map.init_params(rng, **sizes)
    )
  return FeatureVariables(params, projection.value)


def running_stats(
  module: nn.Module,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  query: Array,
  key: Array,
  query_mask: Array | None,
  key_mask: Array | None,
  deterministic: bool,
) -> PyTree:
  """Returns the running statistics from before this call, and updates them.

  The batch of this call enters the statistics of the next one only, so that no
  position is influenced by later positions.

  Args:
    module: called from its compact method.
    feature_map: with statistics="ema"; for any other nothing is kept.
    variables: of the map.
    query: ``[B, T, N G, H]``, not scaled.
    key: ``[B, S, N, H]``, not scaled.
    query_mask: ``[B, T]`` bool, True where a query counts; None for all.
    key_mask: ``[B, S]`` bool, True where a key counts; None for all.
    deterministic: False in training: updates the statistics.

  Returns:
    `stats` for `spectral_attention`; None for a map without running statistics.
  """
  if getattr(feature_map.component, "statistics", None) != "ema":
    return None
  num_heads, head_dim = key.shape[2:]
  sqrt_scale = float(head_dim) ** -0.25

  def moments_of_normal_inputs() -> PyTree:
    shape = (1, 1024, num_heads, head_dim)
    x, y = jax.random.normal(jax.random.key(0), (2, *shape)) * sqrt_scale
    return feature_map.moments(variables, x, y)

  running = module.variable(
    "feature_stats", "moments", moments_of_normal_inputs
  )
  stats = feature_map.solve(running.value)
  if not deterministic and not module.is_initializing():
    query, query_mask = queries_by_key_head(query, query_mask, num_heads)
    new, counts = feature_map.mean_moments(
      variables,
      query.astype(jnp.float32) * sqrt_scale,
      key.astype(jnp.float32) * sqrt_scale,
      key_mask=key_mask,
      query_mask=query_mask,
    )
    rate = jnp.where(counts, 1.0 - _STATS_DECAY, 0.0)
    running.value = jax.tree.map(
      lambda old, new: (1.0 - rate) * old + rate * new, running.value, new
    )
  return stats
