"""What gradients flow through, in states and in the maps' variables."""

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.typing import Array, PyTree


def sums(state: State):
  """The part of a state that gradients flow through."""
  return state.kv, state.total, state.magnitude


def with_sums(state: State, sums) -> State:
  """A state with other sums."""
  return state._replace(kv=sums[0], total=sums[1], magnitude=sums[2])


def gradient_of_state(state: State, sums) -> State:
  """Gradient of the sums; the rest of a state has none."""
  no_gradients = jax.tree.map(lambda x: None, state)
  return with_sums(no_gradients, sums)


def is_float(leaf: Array) -> bool:
  """Whether gradients flow through a leaf."""
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def floats(tree: PyTree) -> list[Array]:
  """The leaves that gradients flow through."""
  return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def with_floats(tree: PyTree, floats: list[Array]) -> PyTree:
  """The tree with other float leaves."""
  new = iter(floats)
  return jax.tree.map(lambda x: next(new) if is_float(x) else x, tree)


def gradient_of_constants(constants: PyTree, d_floats: list[Array]) -> PyTree:
  """Gradients of the float leaves; integers have none."""
  new = iter(d_floats)
  return jax.tree.map(lambda x: next(new) if is_float(x) else None, constants)


def tree_add(a: PyTree, b: PyTree) -> PyTree:
  """Leafwise sum."""
  return jax.tree.map(jnp.add, a, b)
