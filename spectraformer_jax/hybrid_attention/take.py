"""Reads special keys out of the keys of a row."""

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import derivatives, leaves
from spectraformer_jax.typing import Array

# Examples and heads are batches of the operand and of the indices.
_GATHER = jax.lax.GatherDimensionNumbers(
  offset_dims=(3,),
  collapsed_slice_dims=(1,),
  start_index_map=(1,),
  operand_batching_dims=(0, 2),
  start_indices_batching_dims=(0, 1),
)
_SCATTER = jax.lax.ScatterDimensionNumbers(
  update_window_dims=(3,),
  inserted_window_dims=(1,),
  scatter_dims_to_operand_dims=(1,),
  operand_batching_dims=(0, 2),
  scatter_indices_batching_dims=(0, 1),
)


def take_special(x: Array, position: Array) -> tuple[Array, Array]:
  """Returns x, and what it holds at positions.

  Use the x that is returned in place of the argument: the gradient of what was
  taken is then added to the gradient of x, which needs no second array.

  Args:
    x: ``[B, S, N, H]``.
    position: ``[B, N or 1, P]`` int32, at most S - 1.

  Returns:
    x, and ``[B, N, P, H]``.
  """
  heads = x.shape[2]
  position = jnp.broadcast_to(
    position, (position.shape[0], heads, position.shape[2])
  )
  take = derivatives.with_backward(_take, _add, _take)
  return take(x, position)


def _take(x: Array, position: Array) -> tuple[tuple[Array, Array], tuple]:
  sizes = (1, 1, 1, x.shape[3])
  index = position[..., None]
  return (x, jax.lax.gather(x, index, _GATHER, sizes, mode="clip")), ()


def _add(
  inputs: tuple[Array, Array], saved: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array]:
  del saved
  (_, position), (d_x, d_taken) = inputs, gradients
  index = position[..., None]
  d_x = jax.lax.scatter_add(d_x, index, d_taken, _SCATTER, mode="clip")
  return d_x, leaves.no_gradient(position)
