"""Types inside `jax.shard_map`: over which mesh axes an array varies.

A loop's carry, and what a custom derivative returns, must have the type of what
it stands for. Arrays made inside vary over nothing, replicated ones neither, so
those that meet in a loop are cast alike first. Outside of `jax.shard_map`
nothing is done.
"""

import jax

from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.typing import PyTree


def _axes(x) -> frozenset[str]:
  """The mesh axes that x varies over."""
  return jax.typeof(x).manual_axis_type.varying


def varying_like(tree: PyTree, *others: PyTree) -> PyTree:
  """The tree, each leaf varying over all that any leaf here varies over.

  Args:
    tree: of arrays.
    *others: more of them, which are not returned.
  """
  leaves = jax.tree.leaves((tree, others))
  wanted = frozenset().union(*map(_axes, leaves))
  if not wanted:
    return tree

  def cast(leaf):
    missing = tuple(sorted(wanted - _axes(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(cast, tree)


def alike(constants: PyTree, state: State, *arrays: PyTree) -> tuple:
  """All inputs of a loop, cast alike; the state's length keeps its type.

  Nothing is summed into the length, so that what was the same on all devices
  stays so.
  """
  length = state.length
  constants, state, *arrays = varying_like(
    (constants, state._replace(length=None), *arrays), length
  )
  return constants, state._replace(length=length), *arrays
