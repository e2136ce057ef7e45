"""What the baselines share: masked inputs, ranks of real positions, an inverse.

Everything is per row of the batch: no quantity is taken over several rows, or
over padding.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spectraformer_jax import checks, meshes
from spectraformer_jax.typing import Array


def masked_inputs(
  query: Array,
  key: Array,
  value: Array,
  *,
  scale: float | None,
  key_mask: Array | None,
  is_causal: bool = False,
  self_attention: bool = True,
) -> tuple[Array, Array, Array, Array]:
  """Checked, scaled float32 inputs that hold zeros where padding was.

  Args:
    query: ``[B, T, N, H]``; N may be a multiple of the keys' heads, which are
      then repeated (query head n uses key head n // G).
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    scale: of the scores; its root is on each side. None: ``1 / sqrt(H)``.
    key_mask: ``[B, S]`` bool, or None for all.
    is_causal: for the checks.
    self_attention: T == S, and the mask holds for queries as well.

  Returns:
    query, key, value and a mask ``[B, S]``.

  Raises:
    ValueError: shapes that do not agree.
  """
  query, key, value = checks.as_floats(query=query, key=key, value=value)
  key_mask = checks.as_array(key_mask)
  checks.check_bool("is_causal", is_causal)
  checks.check_attention_inputs(query, key, value)
  checks.check_key_mask(key_mask, key)
  if self_attention and query.shape[1] != key.shape[1]:
    raise ValueError(
      "this is self-attention: query and key must share length, got "
      f"query.shape={query.shape}, key.shape={key.shape}."
    )
  if key_mask is None:
    key_mask = jnp.ones(key.shape[:2], bool)
  compute = checks.compute_dtype(query)
  root, computed = checks.scale_parts(scale, query.shape[-1])
  x, y, v = (array.astype(compute) for array in (query, key, value))
  x, y = (checks.times_root(array, computed) for array in (x, y))
  if key.shape[2] != query.shape[2]:
    groups = query.shape[2] // key.shape[2]
    y, v = (jnp.repeat(array, groups, axis=2) for array in (y, v))
  # A product with a zero weight would let NaN through.
  keep = key_mask[:, :, None, None]
  y, v = jnp.where(keep, y * root, 0.0), jnp.where(keep, v, 0.0)
  x = jnp.where(keep, x * root, 0.0) if self_attention else x * root
  return x, y, v, key_mask


def on_shards(
  attend: Callable[..., Array],
  x: Array,
  y: Array,
  v: Array,
  mask: Array,
  *by_head: Array,
) -> Array:
  """Calls ``attend(x, y, v, mask, *by_head)`` on the examples of each device.

  Args:
    attend: returns ``[B, T, N, V]``.
    x: as `masked_inputs` returns it, like y, v and mask.
    y: keys.
    v: values.
    mask: ``[B, S]``.
    *by_head: arrays that lead with ``[N]``.
  """
  out, _ = meshes.on_shards(
    lambda x, y, v, by_head, _, mask: (attend(x, y, v, mask, *by_head), ()),
    *(x, y, v),
    by_head=by_head,
    by_row=(),
    by_example=mask,
  )
  return out


def ranks(mask: Array) -> tuple[Array, Array]:
  """Which real position each is, and how many there are.

  Args:
    mask: ``[B, S]`` bool.

  Returns:
    ``[B, S]`` ints 0, 1, ... at real positions (anything elsewhere), and
    ``[B, 1]``, at least 1.

  Example:
    >>> rank, count = ranks(jnp.array([[False, True, True, False]]))
    >>> rank[0, 1:3].tolist(), count.tolist()
    ([0, 1], [[2]])
  """
  rank = jnp.cumsum(mask, axis=1) - 1
  return rank, jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)


def iterative_inverse(matrix: Array, iterations: int) -> Array:
  r"""The Moore-Penrose inverse, by matrix products alone.

  .. math::
    Z_{k+1} = \tfrac14 Z_k (13 I - A Z_k (15 I - A Z_k (7 I - A Z_k))),
    \qquad Z_0 = A^\top / (|A|_1 |A|_\infty)

  Nystromformer, equation 11 (after Razavi et al., 2014). The public releases
  of Nystromformer and Skyformer start from norms over the whole batch; these
  are of each matrix.

  Args:
    matrix: ``[..., m, m]`` float; rows and columns of zeros stay so.
    iterations: each multiplies the small singular values' share by about 3.

  Returns:
    ``[..., m, m]``.

  Example:
    >>> a = jnp.array([[2.0, 1.0], [0.0, 1.0]])
    >>> bool(jnp.allclose(a @ iterative_inverse(a, 8), jnp.eye(2), atol=1e-5))
    True
  """
  checks.check_positive_int("iterations", iterations)
  size = jnp.abs(matrix)
  # Sums of sizes are at least 0, also where there are none.
  rows, columns = (
    jnp.max(jnp.sum(size, axis), -1, initial=0.0) for axis in (-1, -2)
  )
  norms = rows * columns
  norms = jnp.where(norms > 0.0, norms, 1.0)[..., None, None]
  eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
  eye = eye.reshape((1,) * (matrix.ndim - 2) + eye.shape)

  def product(a, b):
    return jnp.matmul(a, b, precision="highest")

  def step(z, _):
    az = product(matrix, z)
    inner = 15.0 * eye - product(az, 7.0 * eye - az)
    return 0.25 * product(z, 13.0 * eye - product(az, inner)), None

  start = jnp.swapaxes(matrix, -1, -2) / norms
  return jax.lax.scan(step, start, length=iterations)[0]
