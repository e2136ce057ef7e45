"""One head of one example, mapped over heads and examples.

Trees that have an opinion per example and head lead with ``[B, N]``, where
either may be 1: shared by all. Shared leaves are passed on unmapped, so what
depends on them alone is computed once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spectraformer_jax import meshes
from spectraformer_jax.typing import Array, PyTree


def over_examples_and_heads(function: Callable[..., PyTree]) -> Callable:
  """Maps `function` over the two leading axes of its arguments.

  Args:
    function: of trees without leading axes.

  Returns:
    The function of trees whose leaves lead with ``[B, N]`` or ones; its result
    leads with the largest of them.

  Example:
    >>> add = over_examples_and_heads(lambda x, y: x + y)
    >>> add(jnp.ones((3, 1, 5)), jnp.ones((1, 2, 5))).shape
    (3, 2, 5)
  """
  return meshes.on_rows(_over_one_axis(_over_one_axis(function)))


def _over_one_axis(function):
  """Maps over axis 0 of the leaves; those of size 1 are shared."""

  def mapped(*trees):
    leaves, structure = jax.tree.flatten(trees)
    shared = [leaf.shape[0] == 1 for leaf in leaves]
    squeezed = [
      leaf[0] if alone else leaf
      for leaf, alone in zip(leaves, shared, strict=True)
    ]
    of_leaves = lambda leaves: function(*structure.unflatten(leaves))
    if all(shared):
      return jax.tree.map(lambda leaf: leaf[None], of_leaves(squeezed))
    axes = [None if alone else 0 for alone in shared]
    return jax.vmap(of_leaves, in_axes=(axes,))(squeezed)

  return mapped


def lead_with_batch(tree: PyTree) -> PyTree:
  """Leaves ``[N, ...] -> [1, N, ...]``: the same for every example."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def queries_by_key_head(
  query: Array, query_mask: Array | None, num_heads: int
) -> tuple[Array, Array | None]:
  """Grouped queries as more positions of the head of their keys.

  Args:
    query: ``[B, T, N G, H]``: G queries share a key head.
    query_mask: ``[B, T]`` bool or None.
    num_heads: N.

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
