"""The exact kernels that feature maps estimate, and exact attention for them.

`exact_attention` builds the T x S matrix: it is for tests and comparisons, not
for training on long sequences.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from spectraformer_jax import checks
from spectraformer_jax.mixing_laws import LAWS, MixingLaw, build_law
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array


def softmax_kernel(x: Array, y: Array) -> Array:
  """Returns ``exp(x . y)`` for x and y ``[..., H]``, broadcast: ``[...]``."""
  return jnp.exp(jnp.sum(x * y, axis=-1))


def gaussian_kernel(x: Array, y: Array) -> Array:
  """Returns ``exp(-|x - y|^2 / 2)`` for x and y ``[..., H]``: ``[...]``."""
  return jnp.exp(-0.5 * jnp.sum(jnp.square(x - y), axis=-1))


KERNELS: dict[str, Callable[[Array, Array], Array]] = {
  "softmax": softmax_kernel,
  "gaussian": gaussian_kernel,
}

# All kernels that `exact_attention` knows by name.
EXACT_KERNELS = (*KERNELS, *LAWS.names())


def scaled_inputs(
  arrays: checks.AttentionArrays, scale: float | Array | None
) -> tuple[Array, Array, Array]:
  """Prepares inputs for attention that computes each weight.

  Args:
    arrays: the inputs.
    scale: of ``query . key``; its square root multiplies both sides.

  Returns:
    Query ``[B, T, N G, H]``, key and value ``[B, S, N G, ...]`` in float32 at
    least; masked keys and values are zeros, since NaN times a weight of 0 is
    NaN.
  """
  query, key, value = arrays[:3]
  compute = checks.compute_dtype(query)
  sqrt_scale, factor = checks.split_scale(scale, query.shape[-1])
  x, y = (
    checks.times_factor(array.astype(compute), factor) * sqrt_scale
    for array in (query, key)
  )
  v = value.astype(compute)
  if arrays.key_mask is not None:
    mask = arrays.key_mask[:, :, None, None]
    y, v = jnp.where(mask, y, 0.0), jnp.where(mask, v, 0.0)
  if key.shape[2] != query.shape[2]:
    groups = query.shape[2] // key.shape[2]
    y, v = (jnp.repeat(array, groups, axis=2) for array in (y, v))
  return x, y, v


def masked_softmax(scores: Array, visible: Array) -> Array:
  """Returns the softmax over the last axis; zeros if nothing is visible.

  Args:
    scores: ``[..., S]`` float.
    visible: bool, broadcastable to `scores`.
  """
  # Not -inf, which jax_debug_infs would report as an error.
  lowest = jnp.finfo(scores.dtype).min
  scores = jnp.where(visible, scores, lowest)
  top = jnp.max(scores, axis=-1, keepdims=True, initial=lowest)
  weights = jnp.exp(scores - jax.lax.stop_gradient(top))
  weights = jnp.where(visible, weights, 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return weights / jnp.where(total > 0.0, total, 1.0)


def exact_attention(
  query: Float[Array, "B T NG H"],
  key: Float[Array, "B S N H"],
  value: Float[Array, "B S N V"],
  *,
  kernel: str | MixingLaw = "softmax",
  scale: float | Float[Array, ""] | None = None,
  is_causal: bool = False,
  key_mask: Bool[Array, "B S"] | None = None,
  segment_ids: Int[Array, "B T"]
  | tuple[Int[Array, "B T"], Int[Array, "B S"]]
  | None = None,
) -> Float[Array, "B T NG V"]:
  r"""Computes exact kernel attention, O(T S).

  .. math::
    o_i = \sum_j K(x_i, y_j) v_j / \sum_j K(x_i, y_j),
    \qquad x = s^{1/2} q,\; y = s^{1/2} k

  with :math:`K(x, y) = e^{x \cdot y}` ("softmax") or
  :math:`e^{-|x - y|^2 / 2}` ("gaussian"). The two are different layers: the
  Gaussian one equals softmax attention with the key bias :math:`-|y|^2/2`.
  A kernel of :mod:`spectraformer_jax.mixing_laws`, such as :math:`e^{-|x - y|}`
  ("laplacian"), is computed as a logarithm, so that it may underflow; for
  another length scale than 1, divide query and key by it.

  Args:
    query: ``[B, T, N, H]``, any float dtype; N may be G times the number of key
      heads (grouped-query attention: query head n uses key head n // G).
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    kernel: a name of `EXACT_KERNELS`, or a `MixingLaw` with options of its own.
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
  if not isinstance(kernel, MixingLaw):
    check_choice("kernel", kernel, EXACT_KERNELS)
  checks.check_bool("is_causal", is_causal)
  arrays = checks.attention_arrays(
    query, key, value, key_mask=key_mask, segment_ids=segment_ids
  )
  visible = checks.visible_keys(
    arrays.query, arrays.key, is_causal, arrays.key_mask, arrays.segment_ids
  )
  x, y, v = scaled_inputs(arrays, scale)
  # A query that holds NaN or infinity has NaN as output and no gradient, like
  # the masked positions of self-attention.
  not_finite = ~jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
  x = jnp.where(not_finite, 0.0, x)
  scores = _log_kernel(kernel, x, y)
  # A score of -inf has weight 0 beside a finite one. Any other score that is
  # not finite makes the output NaN.
  any_of = functools.partial(jnp.any, axis=-1, keepdims=True)
  overflows = any_of(visible & ~jnp.isfinite(scores) & ~(scores < 0.0))
  overflows |= any_of(visible) & ~any_of(visible & jnp.isfinite(scores))
  weights = masked_softmax(jnp.where(overflows, 0.0, scores), visible)
  out = jnp.einsum("bnts,bsnv->btnv", weights, v, precision="highest")
  out = jnp.where(not_finite | jnp.swapaxes(overflows, 1, 2), jnp.nan, out)
  return out.astype(arrays.value.dtype)


def _log_kernel(kernel: str | MixingLaw, x: Array, y: Array) -> Array:
  """Returns log K ``[B, N, T, S]``, but for a factor of each query alone."""
  if isinstance(kernel, str) and kernel in KERNELS:
    scores = jnp.einsum("btnh,bsnh->bnts", x, y, precision="highest")
    if kernel == "gaussian":
      # The query's own factor is the same for all its keys and cancels.
      scores -= 0.5 * jnp.einsum("bsnh,bsnh->bns", y, y)[:, :, None, :]
    return scores
  # Not |x|^2 + |y|^2 - 2 x.y, which rounds small distances away.
  x, y = (jnp.swapaxes(array, 1, 2) for array in (x, y))
  difference = x[:, :, :, None, :] - y[:, :, None, :, :]
  square = jnp.sum(jnp.square(difference), axis=-1)
  return build_law(kernel).log_kernel(square)
