"""Dense layers between a model's width and heads."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from spectraformer_jax.meshes import is_on_explicit_axes
from spectraformer_jax.typing import Array


def projection(features: int | Sequence[int], **kwargs: Any) -> nn.DenseGeneral:
  """`flax.linen.DenseGeneral`, on a CPU with products of two matrices.

  With more axes XLA turns a wide operand there for the gradient of the weights,
  entry by entry: twice the time of the layer, forward and backward.

  Args:
    features: sizes of the last axes of the result, as of `DenseGeneral`.
    **kwargs: others of its attributes.

  Example:
    >>> layer = projection((2, 8), name="query")
    >>> x = jax.numpy.ones((3, 5, 16))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x).shape
    (3, 5, 2, 8)
  """
  return nn.DenseGeneral(features, dot_general=_product, **kwargs)


def _product(
  x: Array, kernel: Array, dimension_numbers: tuple, **kwargs: Any
) -> Array:
  """``[..., I...]`` and ``[I..., O...] -> [..., O...]``."""
  (contracted, _), _ = dimension_numbers
  general = functools.partial(
    jax.lax.dot_general, dimension_numbers=dimension_numbers, **kwargs
  )
  if is_on_explicit_axes(x, kernel):
    return general(x, kernel)  # divided axes cannot be joined and parted again
  flat = functools.partial(
    _of_matrices, num_contracted=len(contracted), **kwargs
  )
  return jax.lax.platform_dependent(x, kernel, cpu=flat, default=general)


def _of_matrices(
  x: Array, kernel: Array, num_contracted: int, **kwargs: Any
) -> Array:
  outer = x.shape[: x.ndim - num_contracted]
  inner = kernel.shape[num_contracted:]
  width = math.prod(kernel.shape[:num_contracted])
  out = jax.lax.dot_general(
    x.reshape(math.prod(outer), width),
    kernel.reshape(width, math.prod(inner)),
    (((1,), (0,)), ((), ())),
    **kwargs,
  )
  return out.reshape(*outer, *inner)
