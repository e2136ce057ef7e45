"""Which leaves an optimiser may move."""

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import PyTree

# Collections of `sf.nn` whose leaves are drawn or counted, not learnt.
NOT_LEARNT = ("random_features", "feature_stats", "cache")

# What a projection is made of; see `FeatureMap.init_projection`.
PARTS = ("component", "rows")


def trainable(variables: PyTree) -> PyTree:
  """True at the leaves an optimiser may move, False at those of projections.

  A projection takes no gradient, but weight decay shrinks it all the same: it
  is then not what was drawn, and nothing says so. Give optimisers this mask.

  Args:
    variables: `FeatureVariables`, also as the dictionary that a checkpoint
      gives back, the variables of a model, or any tree with those in it.

  Returns:
    A tree of the same structure: False at projections, in the collections
    "random_features", "feature_stats" and "cache", and at all that is not an
    array of floats; True at the others.

  Example:
    >>> import optax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "gmm", num_features=4)
    >>> v = fm.init(jax.random.key(0), head_dim=2)
    >>> mask = sf.trainable({"attention": v, "scale": jnp.ones(3)})
    >>> any(jax.tree.leaves(mask["attention"].projection)), mask["scale"]
    (False, True)
    >>> optimizer = optax.masked(optax.adamw(1e-3), sf.trainable)
  """
  return jax.tree_util.tree_map_with_path(_is_learnt, variables)


def _is_learnt(path, leaf) -> bool:
  """Whether a leaf is an array of floats that is not of a projection."""
  names = [_name(part) for part in path]
  names = [name for name in names if name != "value"]  # of nnx.Variable
  following = zip(names, names[1:], strict=False)
  if any(one == "projection" and two in PARTS for one, two in following):
    return False
  if any(name in NOT_LEARNT for name in names):
    return False
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _name(part) -> str:
  """The name of one step of a path: a key, an attribute or an index."""
  for attribute in ("key", "name", "idx"):
    if hasattr(part, attribute):
      return str(getattr(part, attribute))
  return str(part)
