"""Redraws the random projections of a whole model."""

import jax
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.typing import Array, FeatureVariables, PyTree

_PROJECTION = "projection"


def redraw(
  feature_map: FeatureMap, rng: Array, random_features: PyTree
) -> PyTree:
  """Draws every projection of a model anew; learnable parameters stay.

  One vmapped call draws the projections of all layers: several independent
  batched QR factorisations in one program can deadlock on CPUs with few cores.

  Args:
    feature_map: the map of the model's attention layers.
    rng: PRNG key; must be the same on every replica of the model.
    random_features: collection "random_features" of a model, whose projections
      have equal shapes.

  Returns:
    A collection like `random_features`. Works inside jit.

  Raises:
    ValueError: the weight matrix cannot be redrawn.
  """
  layers, structure = jax.tree.flatten(
    random_features,
    is_leaf=lambda node: isinstance(node, dict) and _PROJECTION in node,
  )
  stacked = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(x[_PROJECTION] for x in layers)
  )

  def redraw_layer(rng: Array, projection: PyTree) -> PyTree:
    return feature_map.redraw(rng, FeatureVariables({}, projection)).projection

  drawn = jax.vmap(redraw_layer)(jax.random.split(rng, len(layers)), stacked)
  return structure.unflatten(
    {_PROJECTION: jax.tree.map(lambda leaf, i=i: leaf[i], drawn)}
    for i in range(len(layers))
  )
