"""Dense layers between a model's width and its heads.

Works around XLA on CPUs. For the weights' gradient of a product of arrays with
more than two axes, XLA transposes a wide operand entry by entry, which doubles
the layer's time, forward and backward. Remove this module once
``python benchmarks/train_step.py`` takes the same time with
`flax.linen.DenseGeneral` without `dot_general`. This module and the use of both
random words in `dropout` were added together: they multiplied the training
step's time by 0.92.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from spectraformer_jax.meshes import is_on_explicit_axes
from spectraformer_jax.typing import Array


def projection(features: int | Sequence[int], **kwargs: Any) -> nn.DenseGeneral:
  """Makes a `flax.linen.DenseGeneral` that, on a CPU, multiplies 2-D matrices.

  Args:
    features: sizes of the last axes of the result, as for `DenseGeneral`.
    **kwargs: its other attributes.

  Example:
    >>> layer = projection((2, 8), name="query")
    >>> x = jax.numpy.ones((3, 5, 16))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x).shape
    (3, 5, 2, 8)
  """
  return nn.DenseGeneral(features, dot_general=_product, **kwargs)


def _product(
  x: Array, kernel: Array, dimension_numbers: Any, **kwargs: Any
) -> Array:
  """Multiplies ``[..., I...]`` by ``[I..., O...]`` to ``[..., O...]``."""
  (contracted, _), _ = dimension_numbers
  general = functools.partial(
    jax.lax.dot_general, dimension_numbers=dimension_numbers, **kwargs
  )
  if is_on_explicit_axes(x, kernel):
    return general(x, kernel)  # axes divided over devices cannot be joined
  outer = x.shape[: x.ndim - len(contracted)]
  inner = kernel.shape[len(contracted) :]
  width = math.prod(kernel.shape[: len(contracted)])

  def of_matrices(x: Array, kernel: Array) -> Array:
    x = x.reshape(math.prod(outer), width)
    kernel = kernel.reshape(width, math.prod(inner))
    out = jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), **kwargs)
    return out.reshape(*outer, *inner)

  return jax.lax.platform_dependent(x, kernel, cpu=of_matrices, default=general)
