"""The leaves of a tree that gradients flow through: arrays of floats."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array, PyTree

Tree = TypeVar("Tree", bound=PyTree)


def is_float(leaf: Array) -> bool:
  """Whether gradients flow through a leaf."""
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def floats(tree: PyTree) -> list[Array]:
  """Returns the leaves that gradients flow through."""
  return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def with_floats(tree: Tree, floats: list[Array]) -> Tree:
  """Returns the tree with other float leaves."""
  new = iter(floats)
  return jax.tree.map(lambda x: next(new) if is_float(x) else x, tree)


def only_floats(tree: Tree, floats: list[Array]) -> Tree:
  """Returns the tree with these float leaves, and None for all others."""
  new = iter(floats)
  return jax.tree.map(lambda x: next(new) if is_float(x) else None, tree)


def no_gradient(tree: Tree) -> Tree:
  """Returns the tree with None for each leaf."""
  return jax.tree.map(lambda x: None, tree)


def tree_add(a: Tree, b: Tree) -> Tree:
  """Returns the leafwise sum."""
  return jax.tree.map(jnp.add, a, b)
