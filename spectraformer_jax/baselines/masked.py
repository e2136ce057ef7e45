"""Helpers of the baselines: masked inputs, numbered positions, an inverse.

No result depends on other examples of the batch or on padding.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax import checks, meshes
from spectraformer_jax.kernels import scaled_inputs
from spectraformer_jax.typing import Array, Mask


class MaskedInputs(NamedTuple):
  """Scaled inputs of attention, float32 at least, with zeros at masked keys.

  Attributes:
    x: queries ``[B, T, N, H]``; zeros at masked positions of self-attention.
    y: keys ``[B, S, N, H]``, repeated for grouped queries.
    v: values ``[B, S, N, V]``, repeated likewise.
    mask: ``[B, S]`` bool, True at visible keys.
  """

  x: Array
  y: Array
  v: Array
  mask: Array


def masked_inputs(
  query: Array,
  key: Array,
  value: Array,
  *,
  scale: float | None,
  key_mask: Mask,
  is_causal: bool = False,
  self_attention: bool = True,
) -> MaskedInputs:
  """Checks and prepares the inputs of a baseline.

  Args:
    query: ``[B, T, N G, H]``: query head n uses key head n // G.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    scale: of ``query . key``; None means ``1 / sqrt(H)``.
    key_mask: ``[B, S]`` bool, or None: all visible.
    is_causal: only checked to be a bool; the caller applies it.
    self_attention: whether T must equal S, and `key_mask` masks queries, too.

  Raises:
    ValueError: shapes that do not agree.
  """
  checks.check_bool("is_causal", is_causal)
  arrays = checks.attention_arrays(query, key, value, key_mask=key_mask)
  query, key, mask = arrays.query, arrays.key, arrays.key_mask
  if self_attention and query.shape[1] != key.shape[1]:
    raise ValueError(
      "this is self-attention: query and key must share length, got "
      f"query.shape={query.shape}, key.shape={key.shape}."
    )
  x, y, v = scaled_inputs(arrays, scale)
  if mask is None:
    mask = jnp.ones(key.shape[:2], bool)
  elif self_attention:
    x = jnp.where(mask[:, :, None, None], x, 0.0)
  return MaskedInputs(x, y, v, mask)


def on_shards(
  attend: Callable[..., Array], inputs: MaskedInputs, *by_head: Array
) -> Array:
  """Calls ``attend(inputs, *by_head)`` on the examples of each device.

  Args:
    attend: returns ``[B, T, N, V]``.
    inputs: of all devices.
    *by_head: arrays that lead with ``[N]``.
  """
  out, _ = meshes.on_shards(
    lambda x, y, v, by_head, _, mask: (
      attend(MaskedInputs(x, y, v, mask), *by_head),
      (),
    ),
    *inputs[:3],
    by_head=by_head,
    by_example_and_head=(),
    by_example=inputs.mask,
  )
  return out


def number_positions(mask: Array) -> tuple[Array, Array]:
  """Numbers the real positions of each example.

  Args:
    mask: ``[B, S]`` bool.

  Returns:
    ``[B, S]`` ints: 0, 1, ... at real positions (meaningless elsewhere); and
    the number of real positions, at least 1, ``[B, 1]``.

  Example:
    >>> mask = jnp.array([[False, True, True, False]])
    >>> number, count = number_positions(mask)
    >>> number[0, 1:3].tolist(), count.tolist()
    ([0, 1], [[2]])
  """
  number = jnp.cumsum(mask, axis=1) - 1
  return number, jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)


def iterative_inverse(matrix: Array, iterations: int) -> Array:
  r"""Approximates the Moore-Penrose inverse, with matrix products only.

  .. math::
    Z_{k+1} = \tfrac14 Z_k (13 I - A Z_k (15 I - A Z_k (7 I - A Z_k))),
    \qquad Z_0 = A^\top / (|A|_1 |A|_\infty)

  Nystromformer, equation 11 (after Razavi et al., 2014). The public releases
  of Nystromformer and Skyformer start from norms over the whole batch; here
  each matrix has its own norms.

  Args:
    matrix: ``[..., m, m]`` float; rows and columns of zeros stay zero.
    iterations: number of steps; each roughly triples the small singular values
      of A Z, until they are near 1.

  Returns:
    ``[..., m, m]``.

  Example:
    >>> a = jnp.array([[2.0, 1.0], [0.0, 1.0]])
    >>> bool(jnp.allclose(a @ iterative_inverse(a, 8), jnp.eye(2), atol=1e-5))
    True
  """
  checks.check_positive_int("iterations", iterations)
  size = jnp.abs(matrix)
  # For m = 0 there is nothing to take a maximum of: it is `initial`.
  rows, columns = (
    jnp.max(jnp.sum(size, axis), -1, initial=0.0) for axis in (-1, -2)
  )
  norms = rows * columns
  norms = jnp.where(norms > 0.0, norms, 1.0)[..., None, None]
  eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
  eye = eye.reshape((1,) * (matrix.ndim - 2) + eye.shape)

  def product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")

  def step(z: Array, _: None) -> tuple[Array, None]:
    az = product(matrix, z)
    inner = 15.0 * eye - product(az, 7.0 * eye - az)
    return 0.25 * product(z, 13.0 * eye - product(az, inner)), None

  start = jnp.swapaxes(matrix, -1, -2) / norms
  return jax.lax.scan(step, start, length=iterations)[0]
