"""Maps a function of one head of one example over heads and examples.

Leaves that differ per example and head lead with ``[B, N]``. Either may be 1,
for a leaf that all share; shared leaves are not mapped, so what depends on them
alone is computed once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spectraformer_jax import meshes
from spectraformer_jax.typing import Array, Mask, PyTree


def over_examples_and_heads(
  function: Callable[..., PyTree],
) -> Callable[..., PyTree]:
  """Maps `function` over the two leading axes of its arguments.

  On a mesh with Explicit axes, each device maps over its examples and heads.

  Args:
    function: takes trees without leading axes.

  Returns:
    A function of trees whose leaves lead with ``[B, N]``, where either may be
    1; the leaves of its result lead with the largest of these sizes.

  Example:
    >>> add = over_examples_and_heads(lambda x, y: x + y)
    >>> add(jnp.ones((3, 1, 5)), jnp.ones((1, 2, 5))).shape
    (3, 2, 5)
  """
  return meshes.on_heads(_over_one_axis(_over_one_axis(function)))


def _over_one_axis(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """Maps over axis 0 of the leaves; those of size 1 are shared."""

  def mapped(*trees: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(trees)
    axes = [None if leaf.shape[0] == 1 else 0 for leaf in leaves]
    leaves = [
      leaf if axis == 0 else leaf[0]
      for leaf, axis in zip(leaves, axes, strict=True)
    ]
    of_leaves = lambda leaves: function(*structure.unflatten(leaves))
    if not any(axis == 0 for axis in axes):
      return jax.tree.map(lambda leaf: leaf[None], of_leaves(leaves))
    return jax.vmap(of_leaves, in_axes=(axes,))(leaves)

  return mapped


def lead_with_batch(tree: PyTree) -> PyTree:
  """Adds a shared batch axis to leaves: ``[N, ...] -> [1, N, ...]``."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def queries_by_key_head(
  query: Array, query_mask: Mask, num_heads: int
) -> tuple[Array, Mask]:
  """Turns the queries that share a key head into more positions of that head.

  Args:
    query: ``[B, T, N G, H]``: G queries share a key head.
    query_mask: ``[B, T]`` bool or None.
    num_heads: N, the number of key heads.

  Returns:
    ``[B, T G, N, H]`` and ``[B, T G]`` or None.
  """
  batch, length, all_heads, head_dim = query.shape
  groups = all_heads // num_heads
  if groups == 1:
    return query, query_mask
  query = query.reshape(batch, length, num_heads, groups, head_dim)
  query = jnp.moveaxis(query, 3, 2).reshape(batch, -1, num_heads, head_dim)
  if query_mask is not None:
    query_mask = jnp.repeat(query_mask, groups, axis=1)
  return query, query_mask
