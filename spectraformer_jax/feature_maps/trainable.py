"""The mask of leaves that an optimiser may update."""

from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import PyTree

# Collections of `sf.nn` whose leaves are not learnt.
NOT_LEARNT = ("random_features", "feature_stats", "cache")

# Keys of a projection; see `FeatureMap.init_projection`.
PARTS = ("component", "rows")


def trainable(variables: PyTree) -> PyTree:
  """Returns True for leaves an optimiser may update, False for projections.

  A projection takes no gradient, but weight decay would still shrink it, and no
  error would say so. Give optimisers this mask.

  Args:
    variables: `FeatureVariables`, also as the dictionary that a checkpoint
      restores, the variables of a model, or any tree that contains them.

  Returns:
    A tree of the same structure: False for projections, for the collections
    "random_features", "feature_stats" and "cache", and for leaves that are not
    arrays of floats; True for all others.

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


def _is_learnt(path: tuple[Any, ...], leaf: Any) -> bool:
  """Returns whether a leaf is a float array outside of projections."""
  names = [_name(part) for part in path]
  names = [name for name in names if name != "value"]  # from nnx.Variable
  pairs = zip(names, names[1:], strict=False)
  if any(outer == "projection" and inner in PARTS for outer, inner in pairs):
    return False
  if any(name in NOT_LEARNT for name in names):
    return False
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _name(part: Any) -> str:
  """Returns the name of one step of a path: a key, attribute or index."""
  for attribute in ("key", "name", "idx"):
    if hasattr(part, attribute):
      return str(getattr(part, attribute))
  return str(part)
