"""What a feature map keeps in a module: leaves and running statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.vmap_heads import queries_by_key_head
from spectraformer_jax.typing import Array, FeatureVariables, PyTree

# Running statistics keep this share of their value at each training step.
STATS_DECAY = 0.99


def feature_variables(
  module: nn.Module, feature_map: FeatureMap, *, head_dim: int, num_heads: int
) -> FeatureVariables:
  """Learnable leaves from "params", drawn ones from "random_features".

  Args:
    module: inside its compact method.
    feature_map: whose leaves they are.
    head_dim: H.
    num_heads: N of the keys, or 1 to share.

  Raises:
    ValueError: no "random_features" where they cannot be made.
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
  shapes = jax.eval_shape(
    lambda: feature_map.init_params(jax.random.key(0), **sizes)
  )
  if jax.tree.leaves(shapes):
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
  *,
  query_mask: Array | None,
  key_mask: Array | None,
  deterministic: bool,
) -> PyTree:
  """Stats of earlier batches; None where the map needs no running ones.

  The step's own batch is counted after it is attended, so that no position
  is influenced by later ones.

  Args:
    module: inside its compact method.
    feature_map: with statistics="ema", or another.
    variables: of the map.
    query: ``[B, T, N G, H]``, not scaled.
    key: ``[B, S, N, H]``.
    query_mask: ``[B, T]`` bool, True where a query counts; None for all.
    key_mask: ``[B, S]``, likewise.
    deterministic: False in training: the batch is counted.
  """
  if getattr(feature_map.component, "statistics", None) != "ema":
    return None
  num_heads, head_dim = key.shape[2:]
  scale = float(head_dim) ** -0.25

  def typical():
    shape = (1, 1024, num_heads, head_dim)
    x, y = jax.random.normal(jax.random.key(0), (2, *shape)) * scale
    return feature_map.moments(variables, x, y)

  running = module.variable("feature_stats", "moments", typical)
  stats = feature_map.solve(running.value)
  if not deterministic and not module.is_initializing():
    query, query_mask = queries_by_key_head(query, query_mask, num_heads)
    new, counts = feature_map.mean_moments(
      variables,
      query.astype(jnp.float32) * scale,
      key.astype(jnp.float32) * scale,
      key_mask=key_mask,
      query_mask=query_mask,
    )
    rate = jnp.where(counts, 1.0 - STATS_DECAY, 0.0)
    running.value = jax.tree.map(
      lambda old, new: (1.0 - rate) * old + rate * new, running.value, new
    )
  return stats
