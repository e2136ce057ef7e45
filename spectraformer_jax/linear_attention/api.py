"""The public call: checks, choice of implementation, masks, normalizer."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.linear_attention import prefix_sum, reference
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array

Sums = Callable[..., tuple[Array, Array]]

# In the order in which implementation=None tries them.
IMPLEMENTATIONS: dict[str, Sums] = {
  "xla": prefix_sum.sums,
  "reference": reference.sums,
}

# A signed normalizer is kept this far from zero, relative to the same sum of
# magnitudes: what float32 sums leave of a value that should be zero.
SIGNED_FLOOR = 1e-6


def linear_attention(
  query_features: Array,
  key_features: Array,
  value: Array,
  *,
  is_causal: bool = False,
  key_mask: Array | None = None,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Array:
  r"""Normalized linear attention on features that exist already, O(T).

  .. math::
    o_i = \frac{\phi_i \cdot \sum_j \psi_j v_j^\top}{\phi_i \cdot \sum_j \psi_j}

  over the keys j that query i sees. Features should be non-negative; where a
  signed map makes a normalizer cancel, `spectral_attention` guards it.

  Args:
    query_features: phi, ``[B, T, N, F]``, any float dtype.
    key_features: psi, ``[B, S, N, F]``.
    value: ``[B, S, N, V]``.
    is_causal: query i sees keys 0..i; needs T == S.
    key_mask: ``[B, S]`` bool, True where a key may be seen. Hidden keys and
      values may hold anything, NaN included.
    chunk_size: positions in one chunk of the causal prefix sum; None is a
      default. Changes speed and memory, not the result.
    implementation: "xla", "reference", a sequence tried in order, or None for
      the best available. Changes speed, not the result.

  Returns:
    ``[B, T, N, V]`` in value's dtype; sums are float32. A query that sees no
    key gives zeros, and zero gradients.

  Raises:
    ValueError: shapes that do not agree, a mask over query and key positions,
      or an unknown implementation.

  References:
    Katharopoulos et al., Transformers are RNNs, 2020, equations 5 and 9
    (2006.16236).

  Example:
    >>> phi = jnp.ones((1, 5, 2, 8))
    >>> linear_attention(phi, phi, jnp.ones((1, 5, 2, 4)), is_causal=True).shape
    (1, 5, 2, 4)
  """
  checks.check_attention_inputs(
    query_features,
    key_features,
    value,
    is_causal=is_causal,
    depth="feature dim",
  )
  checks.check_key_mask(key_mask, key_features)
  return attend(
    query_features,
    key_features,
    value,
    is_causal=is_causal,
    key_mask=key_mask,
    chunk_size=chunk_size,
    implementation=implementation,
    is_signed=False,
  )


def attend(
  query_features: Array,
  key_features: Array,
  value: Array,
  *,
  is_causal: bool,
  key_mask: Array | None,
  chunk_size: int | None,
  implementation: str | Sequence[str] | None,
  is_signed: bool,
) -> Array:
  """`linear_attention` on checked inputs; `is_signed` guards the normalizer."""
  if chunk_size is not None:
    checks.check_positive_int("chunk_size", chunk_size)
  sums = choose(implementation)
  phi, psi = (x.astype(jnp.float32) for x in (query_features, key_features))
  values = value.astype(jnp.float32)
  if key_mask is not None:
    keep = key_mask[:, :, None, None]
    psi, values = jnp.where(keep, psi, 0.0), jnp.where(keep, values, 0.0)
  options = {"is_causal": is_causal, "chunk_size": chunk_size}
  numerator, normalizer = sums(phi, psi, values, **options)
  if is_signed:
    # The same sums of magnitudes say how much of the normalizer cancelled.
    ones = jnp.ones((*psi.shape[:3], 1), jnp.float32)
    magnitude, _ = sums(jnp.abs(phi), jnp.abs(psi), ones, **options)
    normalizer = guard_signed(normalizer, magnitude[..., 0])
  sees_keys = normalizer != 0.0
  out = numerator / jnp.where(sees_keys, normalizer, 1.0)[..., None]
  out = jnp.where(sees_keys[..., None], out, 0.0)
  return out.astype(value.dtype)


def guard_signed(normalizer: Array, magnitude: Array) -> Array:
  """Keeps a signed normalizer off zero: sign(0) is +1, no keys stay 0."""
  floor = SIGNED_FLOOR * magnitude
  sign = jnp.where(normalizer < 0.0, -1.0, 1.0)
  return sign * jnp.maximum(jnp.abs(normalizer), floor)


def choose(implementation: str | Sequence[str] | None) -> Sums:
  """The first implementation asked for; ValueError for an unknown name."""
  if implementation is None:
    names = tuple(IMPLEMENTATIONS)
  elif isinstance(implementation, str):
    names = (implementation,)
  else:
    names = tuple(implementation)
  if not names:
    raise ValueError("implementation must name at least one, got ().")
  for name in names:
    if name not in IMPLEMENTATIONS:
      raise ValueError(
        f"Unknown implementation {name!r}.{nearest(name, IMPLEMENTATIONS)}"
      )
  return IMPLEMENTATIONS[names[0]]
