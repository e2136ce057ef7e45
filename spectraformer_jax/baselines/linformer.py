"""Linformer: keys and values projected to a fixed length."""

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.baselines.masked import (
  MaskedInputs,
  masked_inputs,
  on_shards,
)
from spectraformer_jax.kernels import masked_softmax
from spectraformer_jax.typing import Array


def linformer_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  key_projection: Array,
  value_projection: Array | None = None,
  scale: float | None = None,
  key_mask: Array | None = None,
) -> Array:
  r"""Softmax attention over P learned mixtures of positions, O(T P).

  .. math::
    O = \operatorname{softmax}(Q (E K)^\top / \sqrt H)\, F V

  Masked keys and values are set to zero before they are mixed, as in public
  code; the paper has no mask. Queries attend to all P mixtures, so E = F = I
  gives exact attention if no key is masked.

  Args:
    query: ``[B, T, N, H]``, any float dtype.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    key_projection: E, ``[N, P, L]`` with L at least S; the first S columns are
      used.
    value_projection: F, the same; None for E ("key-value sharing", section 4).
    scale: None means ``1 / sqrt(H)``.
    key_mask: ``[B, S]`` bool, True where a key may be seen.

  Returns:
    ``[B, T, N, V]`` in value's dtype, computed in float32 at least. Zeros for
    an example without visible keys.

  Raises:
    ValueError: shapes that do not agree, or a sequence longer than L.

  Example:
    >>> q = jnp.ones((1, 6, 2, 4))
    >>> e = jnp.ones((2, 3, 8)) / 8
    >>> linformer_attention(q, q, q, key_projection=e).shape
    (1, 6, 2, 4)

  References:
    Wang et al., `Linformer: Self-Attention with Linear Complexity
    <https://arxiv.org/abs/2006.04768>`_, 2020, equation 7.
  """
  if value_projection is None:
    value_projection = key_projection
  inputs = masked_inputs(
    query, key, value, scale=scale, key_mask=key_mask, self_attention=False
  )
  length = key.shape[1]
  for name, array in (("key", key_projection), ("value", value_projection)):
    if array.ndim != 3 or array.shape[0] != key.shape[2]:
      raise ValueError(
        f"{name}_projection must be [heads, projected, length], got "
        f"{array.shape} for key.shape={key.shape}."
      )
    if array.shape[2] < length:
      raise ValueError(
        f"the sequence has {length} positions, {name}_projection.shape="
        f"{array.shape} is for {array.shape[2]} at most."
      )
  out = on_shards(_attend, inputs, key_projection, value_projection)
  return out.astype(value.dtype)


def _attend(
  inputs: MaskedInputs, key_projection: Array, value_projection: Array
) -> Array:
  """Computes `linformer_attention` of prepared inputs."""
  x, y, v, mask = inputs
  mix = lambda projection, array: jnp.einsum(
    "nps,bsnh->bpnh",
    projection[:, :, : array.shape[1]].astype(array.dtype),
    array,
    precision="highest",
  )
  y, v = mix(key_projection, y), mix(value_projection, v)
  scores = jnp.einsum("btnh,bpnh->bntp", x, y, precision="highest")
  has_keys = jnp.any(mask, axis=1)[:, None, None, None]
  weights = masked_softmax(scores, has_keys)
  return jnp.einsum("bntp,bpnv->btnv", weights, v, precision="highest")


def linformer_projections(
  rng: Array,
  *,
  num_heads: int,
  max_len: int,
  projected_length: int = 128,
  share_key_value: bool = True,
) -> dict[str, Array]:
  """Draws E and F: normal with variance ``1 / P``, as in theorem 2.

  Args:
    rng: PRNG key.
    num_heads: N.
    max_len: L, the longest sequence.
    projected_length: P.
    share_key_value: whether F is E.

  Returns:
    ``key_projection`` and, unless shared, ``value_projection``; both
    ``[N, P, L]``.

  Example:
    >>> params = linformer_projections(
    ...   jax.random.key(0), num_heads=2, max_len=8, projected_length=3)
    >>> {name: array.shape for name, array in params.items()}
    {'key_projection': (2, 3, 8)}
  """
  checks.check_positive_int("projected_length", projected_length)
  names = ("key_projection", "value_projection")[: 2 - share_key_value]
  shape = (num_heads, projected_length, max_len)
  return {
    name: jax.random.normal(key, shape) * projected_length**-0.5
    for name, key in zip(names, jax.random.split(rng, len(names)), strict=True)
  }
