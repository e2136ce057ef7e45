"""Types inside `jax.shard_map`: over which mesh axes an array varies.

A loop's carry must keep its type, and a custom derivative must have the type
of its primal. Arrays made inside `jax.shard_map` and replicated arrays vary
over no mesh axis, so all arrays that meet in a loop are cast to one type first.
Outside of `jax.shard_map` these functions do nothing.
"""

from typing import TypeVar

import jax

from spectraformer_jax.linear_attention.state import JoinedState
from spectraformer_jax.typing import Array, PyTree

Tree = TypeVar("Tree", bound=PyTree)


def _axes(x: Array) -> frozenset[str]:
  """Returns the mesh axes that x varies over."""
  return jax.typeof(x).manual_axis_type.varying


def varying_like(tree: Tree, *others: PyTree) -> Tree:
  """Returns the tree, cast to vary over every axis that any leaf varies over.

  Args:
    tree: arrays to cast.
    *others: arrays whose axes count as well, and which are not returned.
  """
  leaves = jax.tree.leaves((tree, others))
  wanted = frozenset().union(*map(_axes, leaves))
  if not wanted:
    return tree

  def cast(leaf: Array) -> Array:
    missing = tuple(sorted(wanted - _axes(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(cast, tree)


def alike(
  constants: PyTree, state: JoinedState, arrays: Tree
) -> tuple[PyTree, JoinedState, Tree]:
  """Casts all inputs of a loop to vary alike, except the state's length.

  The length is a sum of sizes, which is the same on all devices.
  """
  length = state.length
  constants, state, arrays = varying_like(
    (constants, state._replace(length=None), arrays), length
  )
  return constants, state._replace(length=length), arrays
