"""The exact kernels that feature maps estimate, and exact attention for them.

`exact_attention` builds the T x S matrix. It is the oracle of the tests and the
baseline of the study, not the way to train on long sequences.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array


def softmax_kernel(x: Array, y: Array) -> Array:
  """``exp(x . y)`` for x and y ``[..., H]``, broadcast -> ``[...]``."""
  return jnp.exp(jnp.sum(x * y, axis=-1))


def gaussian_kernel(x: Array, y: Array) -> Array:
  """``exp(-|x - y|^2 / 2)`` for x and y ``[..., H]`` -> ``[...]``."""
  return jnp.exp(-0.5 * jnp.sum(jnp.square(x - y), axis=-1))


KERNELS: dict[str, Callable[[Array, Array], Array]] = {
  "softmax": softmax_kernel,
  "gaussian": gaussian_kernel,
}


def check_kernel(kernel: str) -> None:
  """ValueError unless `kernel` names an exact kernel."""
  if kernel not in KERNELS:
    raise ValueError(f"Unknown kernel {kernel!r}.{nearest(kernel, KERNELS)}")


def masked_softmax(scores: Array, visible: Array) -> Array:
  """Softmax over the last axis; zeros where nothing is visible.

  Args:
    scores: ``[..., S]`` float.
    visible: bool, broadcastable to `scores`.
  """
  # Not -inf, which jax_debug_infs would take for a fault.
  lowest = jnp.finfo(scores.dtype).min
  scores = jnp.where(visible, scores, lowest)
  top = jnp.max(scores, axis=-1, keepdims=True, initial=lowest)
  weights = jnp.exp(scores - jax.lax.stop_gradient(top))
  weights = jnp.where(visible, weights, 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return weights / jnp.where(total > 0.0, total, 1.0)


def exact_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  kernel: str = "softmax",
  scale: float | None = None,
  is_causal: bool = False,
  key_mask: Array | None = None,
  segment_ids: Array | tuple[Array, Array] | None = None,
) -> Array:
  r"""Exact kernel attention, O(T S): the oracle.

  .. math::
    o_i = \sum_j K(x_i, y_j) v_j / \sum_j K(x_i, y_j),
    \qquad x = s^{1/2} q,\; y = s^{1/2} k

  with :math:`K(x, y) = e^{x \cdot y}` ("softmax") or
  :math:`e^{-|x - y|^2 / 2}` ("gaussian"). The two are different layers: the
  Gaussian one equals softmax attention with the key bias :math:`-|y|^2/2`.

  Args:
    query: ``[B, T, N, H]``, any float dtype; N may be a multiple of the keys'
      heads (grouped-query attention: query head n uses key head n // G).
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    kernel: "softmax" or "gaussian".
    scale: s above, a number or a scalar array; None means ``1 / sqrt(H)``.
    is_causal: query i sees keys 0..i, whatever T and S are.
    key_mask: ``[B, S]`` bool, True where a key may be seen.
    segment_ids: ints ``[B, T]`` of packed rows (T == S), or a pair
      ``([B, T], [B, S])``; a query sees keys of its own segment only.

  Returns:
    ``[B, T, N, V]`` in value's dtype, computed in float32 at least. A query
    that sees no key gives zeros.

  Raises:
    ValueError: shapes that do not agree, arrays that are not float, or an
      unknown kernel.

  Example:
    >>> q = jnp.ones((1, 3, 2, 4))
    >>> exact_attention(q, q, q, is_causal=True).shape
    (1, 3, 2, 4)
  """
  check_kernel(kernel)
  query, key, value = checks.as_floats(query=query, key=key, value=value)
  key_mask = checks.as_array(key_mask)
  segment_ids = checks.as_segment_ids(segment_ids)
  checks.check_bool("is_causal", is_causal)
  checks.check_attention_inputs(query, key, value)
  checks.check_key_mask(key_mask, key)
  visible = checks.visible_keys(query, key, is_causal, key_mask, segment_ids)
  compute = checks.compute_dtype(query)
  root, computed = checks.scale_parts(scale, query.shape[-1])
  x, y = (
    checks.times_root(array.astype(compute), computed) * root
    for array in (query, key)
  )
  v = value.astype(compute)
  if key_mask is not None:
    # A product with a zero weight would let NaN through.
    keep = key_mask[:, :, None, None]
    y, v = jnp.where(keep, y, 0.0), jnp.where(keep, v, 0.0)
  # Queries that hold NaN, or too much, give NaN and no gradient: the padding
  # of self-attention is among them.
  holds_nan = ~jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
  x = jnp.where(holds_nan, 0.0, x)
  if key.shape[2] != query.shape[2]:
    groups = query.shape[2] // key.shape[2]
    y, v = (jnp.repeat(array, groups, axis=2) for array in (y, v))
  scores = jnp.einsum("btnh,bsnh->bnts", x, y, precision="highest")
  if kernel == "gaussian":
    # The query's own factor is the same for all its keys and cancels.
    scores -= 0.5 * jnp.einsum("bsnh,bsnh->bns", y, y)[:, :, None, :]
  # Not so a score of -inf, whose weight is 0 beside one that is finite.
  any_of = functools.partial(jnp.any, axis=-1, keepdims=True)
  overflows = any_of(visible & ~jnp.isfinite(scores) & ~(scores < 0.0))
  overflows |= any_of(visible) & ~any_of(visible & jnp.isfinite(scores))
  weights = masked_softmax(jnp.where(overflows, 0.0, scores), visible)
  out = jnp.einsum("bnts,bsnv->btnv", weights, v, precision="highest")
  out = jnp.where(holds_nan | jnp.swapaxes(overflows, 1, 2), jnp.nan, out)
  return out.astype(value.dtype)
