"""Exact weights: sums over the keys that a block of queries sees exactly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.hybrid_attention.layout import Setting
from spectraformer_jax.hybrid_attention.parts import Part
from spectraformer_jax.linear_attention.exponents import (
  LOWEST,
  power_of_two,
  split,
  whole_exponent,
)
from spectraformer_jax.linear_attention.xla.products import Products
from spectraformer_jax.typing import Array


class BlockKeys(NamedTuple):
  """Keys that a block of queries sees exactly.

  Attributes:
    key: ``[B, N, W, H]``, unscaled; with an axis of queries ``[B, N, C, W, H]``
      where each query has keys of its own.
    value: ``[B, N, (C,) W, V]``.
    is_visible: bool, broadcastable to ``[B, N, G, C, W]``.
  """

  key: Array
  value: Array
  is_visible: Array

  @property
  def names(self) -> str:
    """The axes of `key` and `value` but the last, for `jax.numpy.einsum`."""
    return "bncw" if self.key.ndim == 5 else "bnw"


def log_kernel(setting: Setting, query: Array, keys: BlockKeys) -> Array:
  """Returns log K ``[B, N, G, C, W]`` of unscaled queries and keys, float32."""
  x, y = (
    array.astype(jnp.float32) * setting.sqrt_scale
    for array in (query, keys.key)
  )
  scores = jnp.einsum(f"bngch,{keys.names}h->bngcw", x, y, precision="highest")
  if setting.kernel == "gaussian":
    half_square = lambda array: 0.5 * jnp.sum(jnp.square(array), axis=-1)
    of_keys = half_square(y)
    if keys.key.ndim == 4:
      of_keys = of_keys[:, :, None]
    scores -= half_square(x)[..., None] + of_keys[:, :, None]
  return scores


def exact_part(
  setting: Setting, products: Products, query: Array, *keys: BlockKeys
) -> Part:
  """Returns the sums over all visible keys of several sets.

  Args:
    setting: see `Setting`.
    products: how exponentials are differentiated.
    query: ``[B, N, G, C, H]``.
    *keys: disjoint sets of keys.
  """
  # The score of a hidden key, at which its weight is 0.
  lowest = -(2.0**29)
  scores = [
    jnp.where(of_set.is_visible, log_kernel(setting, query, of_set), lowest)
    for of_set in keys
  ]
  top = jnp.full((*query.shape[:-1], 1), lowest, jnp.float32)
  for score in jax.lax.stop_gradient(scores):
    largest = jnp.max(score, axis=-1, keepdims=True, initial=lowest)
    top = jnp.maximum(top, largest)
  # For a query without visible keys, the exponent that makes all weights 0.
  exponent = jnp.where(top > lowest, whole_exponent(top), -LOWEST)
  numerator = normalizer = jnp.zeros((), jnp.float32)
  for of_set, score in zip(keys, scores, strict=True):
    mantissa, own = split(score)
    weights = mantissa * power_of_two(own - exponent)
    weights = products.exponential(score, weights)
    value = of_set.value.astype(jnp.float32)
    numerator += jnp.einsum(f"bngcw,{of_set.names}v->bngcv", weights, value)
    normalizer += jnp.sum(weights, axis=-1, keepdims=True)
  sums = jnp.concatenate([numerator, normalizer], axis=-1)
  return Part(sums, None, jnp.where(top > lowest, exponent, LOWEST))
