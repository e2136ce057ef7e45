"""Hints to XLA: where arrays lie in memory, and when they are computed.

Which hint is fast depends on the platform; results do not. Layouts are given
only in programs of one device, or of one device inside `jax.shard_map`: the
partitioner of other programs does not know the operation that sets a layout,
and gathers the whole array. An exported program must not contain a layout.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from spectraformer_jax.typing import Array

Form = Callable[[Array], Array]


def in_columns(x: Array) -> Array:
  """Returns x, on a TPU with the axis before the last contiguous.

  A TPU's register holds 128 numbers of the contiguous axis. Positions fill it;
  the 32 dims of a head do not. To be dropped once ``benchmarks/aot.py`` shows
  the same cycles without it (docs/decisions/08-tpu-layouts.md).
  """
  on_tpu = functools.partial(_laid_out.bind, layout=_in_columns, plain=_same)
  return jax.lax.platform_dependent(x, tpu=on_tpu, default=_same)


def transposed(x: Array) -> Array:
  """Transposes the last two axes, on a CPU in memory too.

  Without the barriers XLA makes the transposition a part of the product before
  or after it. Without the layouts it may leave x as it is in memory; the
  product then reads or writes columns, at which XLA aborts for small shapes. To
  be dropped with the products that need it, see `xla.products`.
  """
  on_cpu = functools.partial(
    _laid_out.bind, layout=_transposed_in_memory, plain=_swap_last_axes
  )
  return jax.lax.platform_dependent(x, cpu=on_cpu, default=_swap_last_axes)


def behind_barrier(x: Array) -> Array:
  """Returns x behind a barrier: else XLA computes it again for each feature.

  A TPU gets no barrier: XLA would store x, rounded to bfloat16, for the product
  that reads it, which takes longer than to compute x inside the product
  (docs/decisions/08-tpu-layouts.md).
  """
  return jax.lax.platform_dependent(
    x, tpu=_same, default=jax.lax.optimization_barrier
  )


def _in_columns(x: Array) -> Array:
  *leading, row, column = range(x.ndim)
  return with_layout_constraint(x, Layout((*leading, column, row)))


def _transposed_in_memory(x: Array) -> Array:
  return _in_rows(_swap_last_axes(_in_rows(x)))


def _in_rows(x: Array) -> Array:
  """Returns x behind a barrier, with the last axis contiguous."""
  row_major = Layout(tuple(range(x.ndim)))
  return jax.lax.optimization_barrier(with_layout_constraint(x, row_major))


def _swap_last_axes(x: Array) -> Array:
  return jnp.swapaxes(x, -1, -2)


def _same(x: Array) -> Array:
  return x


# A linear function that is its own transpose, in two forms: `layout` constrains
# where arrays lie, `plain` does not.
_laid_out = Primitive("laid_out")


@_laid_out.def_impl
def _impl(x: Array, *, layout: Form, plain: Form) -> Array:
  del layout
  return plain(x)


@_laid_out.def_abstract_eval
def _abstract(x: Any, *, layout: Form, plain: Form) -> Any:
  del layout
  return x.update(shape=jax.eval_shape(plain, x).shape)


def _lower(ctx: Any, x: Any, *, layout: Form, plain: Form) -> Sequence[Any]:
  """Lowers `layout` if the program allows it, else `plain`."""
  form = layout if _is_of_one_device(ctx.module_context) else plain
  return mlir.lower_fun(form, multiple_results=False)(ctx, x)


def _is_of_one_device(module: Any) -> bool:
  """Whether no partitioner divides the program, and it is not exported."""
  if module.lowering_parameters.for_export:
    return False
  axes = module.axis_context
  if hasattr(axes, "manual_axes"):
    # `jax.shard_map` must leave no mesh axis to the partitioner.
    return axes.manual_axes == frozenset(axes.mesh.axis_names)
  return getattr(axes, "num_devices", 1) == 1


def _batched(
  operands: Sequence[Array], axes: Sequence[int], **forms: Form
) -> tuple[Array, int]:
  """Moves the batch axis to the front: both forms take any leading axes."""
  (x,), (axis,) = operands, axes
  return _laid_out.bind(jnp.moveaxis(x, axis, 0), **forms), 0


mlir.register_lowering(_laid_out, _lower)
ad.deflinear2(_laid_out, lambda ct, _, **forms: [_laid_out.bind(ct, **forms)])
batching.primitive_batchers[_laid_out] = _batched
