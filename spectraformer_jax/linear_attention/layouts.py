"""Where arrays lie in memory, and when they are made, said to XLA.

What is best differs by platform; results do not. Layouts are said in programs
of one device alone, or of one inside `jax.shard_map`: to the partitioner of
others a layout is an operation of which it knows nothing, for which it gathers
the whole array, and an exported program must not hold one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from spectraformer_jax.typing import Array


def in_columns(x: Array) -> Array:
  """x, on a TPU with the axis before the last contiguous.

  A register holds 128 numbers of that axis: positions fill it, 32 dims of a
  head do not, and what is one number a position need not be spread over it.
  """
  return jax.lax.platform_dependent(x, tpu=_columns, default=_same)


def turned(x: Array) -> Array:
  """``[..., A, B] -> [..., B, A]``, on a CPU in memory too.

  Without the barriers XLA makes it a part of the product before or after it.
  Without the layouts it may turn nothing, and the product has an operand or a
  result in columns, at which XLA aborts for small shapes.
  """
  return jax.lax.platform_dependent(x, cpu=_turned, default=_swap)


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


def _columns(x: Array) -> Array:
  return _laid_out.bind(x, layout=_in_columns, plain=_same)


def _turned(x: Array) -> Array:
  return _laid_out.bind(x, layout=_turned_in_memory, plain=_swap)


# A linear function that is its own transpose, in two forms: `layout`, which
# says where arrays lie, and `plain`.
_laid_out = Primitive("laid_out")


@_laid_out.def_impl
def _impl(x: Array, *, layout: Callable, plain: Callable) -> Array:
  del layout
  return plain(x)


@_laid_out.def_abstract_eval
def _abstract(x, *, layout: Callable, plain: Callable):
  del layout
  return x.update(shape=jax.eval_shape(plain, x).shape)


def _lower(ctx, x, *, layout: Callable, plain: Callable):
  """Either form, for the program that it becomes a part of."""
  form = layout if _is_of_one_device(ctx.module_context) else plain
  return mlir.lower_fun(form, multiple_results=False)(ctx, x)


def _is_of_one_device(module) -> bool:
  """Whether nobody divides the program, and it is not for others."""
  if module.lowering_parameters.for_export:
    return False
  axes = module.axis_context
  if hasattr(axes, "manual_axes"):
    return axes.manual_axes == frozenset(axes.mesh.axis_names)
  return getattr(axes, "num_devices", 1) == 1


def _batched(operands, axes, **forms):
  """Both forms take any leading axes."""
  (x,), (axis,) = operands, axes
  return _laid_out.bind(jnp.moveaxis(x, axis, 0), **forms), 0


mlir.register_lowering(_laid_out, _lower)
ad.deflinear2(_laid_out, lambda ct, _, **forms: [_laid_out.bind(ct, **forms)])
batching.primitive_batchers[_laid_out] = _batched
