"""Where arrays lie in memory, and when they are made, said to XLA.

What is best differs by platform; results do not.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from spectraformer_jax.typing import Array


def in_columns(x: Array) -> Array:
  """x, on a TPU with the axis before the last contiguous.

  A register holds 128 numbers of that axis: positions fill it, 32 dims of a
  head do not, and what is one number a position need not be spread over it.
  """
  return jax.lax.platform_dependent(x, tpu=_in_columns, default=_same)


def turned(x: Array) -> Array:
  """``[..., A, B] -> [..., B, A]``, on a CPU in memory too.

  Without the barriers XLA makes it a part of the product before or after it.
  Without the layouts it may turn nothing, and the product has an operand or a
  result in columns, at which XLA aborts for small shapes.
  """
  return jax.lax.platform_dependent(x, cpu=_turned_in_memory, default=_swap)


def once(x: Array) -> Array:
  """x, computed before its use: XLA would do it again for each feature.

  Not on a TPU: it rounds what is stored for a product to bfloat16, which takes
  longer there than to make it inside the product.
  """
  return jax.lax.platform_dependent(
    x, tpu=_same, default=jax.lax.optimization_barrier
  )


def _in_columns(x: Array) -> Array:
  *leading, row, column = range(x.ndim)
  return with_layout_constraint(x, Layout((*leading, column, row)))


def _turned_in_memory(x: Array) -> Array:
  return _in_rows(_swap(_in_rows(x)))


def _in_rows(x: Array) -> Array:
  """x, computed before its use, the last axis contiguous."""
  row_major = Layout(tuple(range(x.ndim)))
  return jax.lax.optimization_barrier(with_layout_constraint(x, row_major))


def _swap(x: Array) -> Array:
  return jnp.swapaxes(x, -1, -2)


def _same(x: Array) -> Array:
  return x
