"""Increasing piecewise linear functions with learnable values at knots."""

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices.learners import inverse_softplus


def identity_increments(knots: np.ndarray) -> Array:
  """Parameters ``[K]`` with which `monotone_spline` is the identity.

  Args:
    knots: ``[K + 1]``, increasing.
  """
  return inverse_softplus(jnp.asarray(np.diff(knots), jnp.float32))


def monotone_spline(
  x: Array, knots: np.ndarray, start: Array, increments: Array
) -> Array:
  """An increasing function through learnable values, slope 1 outside knots.

  The value at knot 0 is `start`, at knot i it is that of knot i - 1 plus
  ``softplus(increments[i - 1])``. Computed as a sum of ramps, one per interval:
  no look-up, so its gradient is no scatter.

  Args:
    x: any shape, float32.
    knots: ``[K + 1]``, increasing.
    start: broadcasts against x.
    increments: ``[K]``, followed by axes that broadcast against those of x.

  Returns:
    Same shape as x.

  Example:
    >>> knots = np.linspace(-4.0, 4.0, 17)
    >>> p = identity_increments(knots)
    >>> x = jnp.array([-9.0, -0.3, 7.0])
    >>> y = monotone_spline(x, knots, jnp.float32(-4.0), p)
    >>> bool(jnp.allclose(y, x, atol=1e-5))
    True
  """
  rises = jax.nn.softplus(increments)
  below = jnp.minimum(x - np.float32(knots[0]), 0.0)
  above = jnp.maximum(x - np.float32(knots[-1]), 0.0)
  total = start + below + above
  for i, (left, right) in enumerate(zip(knots, knots[1:], strict=False)):
    ramp = (x - np.float32(left)) * np.float32(1.0 / (right - left))
    total = total + rises[i] * jnp.clip(ramp, 0.0, 1.0)
  return total
