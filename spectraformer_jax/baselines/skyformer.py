"""Skyformer: approximates the Gaussian kernel matrix through landmarks."""

import functools

import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.baselines.masked import (
  MaskedInputs,
  iterative_inverse,
  masked_inputs,
  number_positions,
  on_shards,
)
from spectraformer_jax.typing import Array


def skyformer_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  num_landmarks: int = 128,
  regularisation: float = 0.1,
  iterations: int = 6,
  scale: float | None = None,
  key_mask: Array | None = None,
) -> Array:
  r"""Nystrom approximation of Gaussian kernel attention, O(T m).

  .. math::
    O = C(Q, U)\,(C(U, U) + \gamma I)^{-1}\,C(U, K)\,V,
    \qquad C(x, y) = e^{-|x - y|^2 / 2}

  The landmarks U are queries and keys together, so that C(U, U) is positive
  definite. As in the paper, the weights of a query are not normalised; the
  exact "gaussian" attention of this library normalises them.

  The paper draws U at random (its code draws again in every evaluation). Here U
  is half queries and half keys, at evenly spaced *real* positions of each
  example, so it needs no PRNG key and does not depend on padding. An example of
  at most m / 2 positions uses all of them, and the only errors are those of
  gamma and of the iterative inverse.

  Args:
    query: ``[B, T, N, H]``, any float dtype.
    key: ``[B, T, N, H]``.
    value: ``[B, T, N, V]``.
    num_landmarks: m, even.
    regularisation: gamma above; the authors' code uses 0.1.
    iterations: of `iterative_inverse`, which gets the matrix scaled to row sums
      near 1 (section 4.3).
    scale: None means ``1 / sqrt(H)``.
    key_mask: ``[B, T]`` bool, True at real positions.

  Returns:
    ``[B, T, N, V]`` in value's dtype, computed in float32 at least. Zeros at
    masked positions.

  Raises:
    ValueError: shapes that do not agree, or options out of range.

  Example:
    >>> q = jnp.ones((1, 6, 2, 4))
    >>> skyformer_attention(q, q, q, num_landmarks=4).shape
    (1, 6, 2, 4)

  References:
    Chen et al., `Skyformer: Remodel Self-Attention with Gaussian Kernel and
    Nystrom Method <https://arxiv.org/abs/2111.00035>`_, 2021, sections 4.1
    to 4.3.
  """
  checks.check_positive_int("num_landmarks", num_landmarks)
  if num_landmarks % 2:
    raise ValueError(
      f"num_landmarks must be even (queries and keys), got {num_landmarks}."
    )
  if not regularisation > 0:
    raise ValueError(f"regularisation must be positive, got {regularisation}.")
  inputs = masked_inputs(query, key, value, scale=scale, key_mask=key_mask)
  attend = functools.partial(
    _attend,
    num_landmarks=num_landmarks,
    iterations=iterations,
    regularisation=regularisation,
  )
  return on_shards(attend, inputs).astype(value.dtype)


def _attend(
  inputs: MaskedInputs,
  *,
  num_landmarks: int,
  iterations: int,
  regularisation: float,
) -> Array:
  """Computes `skyformer_attention` of prepared inputs."""
  x, y, v, mask = inputs
  half = num_landmarks // 2
  _, count = number_positions(mask)
  slot = jnp.arange(half)[None]
  # With fewer than m / 2 positions, each of them is taken once.
  number = slot * jnp.maximum(count, half) // half
  real_first = jnp.argsort(~mask, axis=1, stable=True)
  index = jnp.take_along_axis(
    real_first, jnp.minimum(number, mask.shape[1] - 1), axis=1
  )
  # Unlike `count`, the sum is 0 for an example without keys.
  used = slot < jnp.sum(mask, axis=1, keepdims=True)
  take = lambda array: jnp.take_along_axis(
    array, index[:, :, None, None], axis=1
  )
  landmarks = jnp.concatenate([take(x), take(y)], axis=1)
  used = jnp.concatenate([used, used], axis=1)

  def kernel(a: Array, b: Array, a_mask: Array, b_mask: Array) -> Array:
    """Returns the kernel ``[B, N, A, C]``, zero where a or b is masked."""
    dots = jnp.einsum("banh,bcnh->bnac", a, b, precision="highest")
    squares = lambda z: jnp.moveaxis(jnp.sum(jnp.square(z), axis=-1), 1, 2)
    distance = squares(a)[..., :, None] + squares(b)[..., None, :] - 2 * dots
    both = a_mask[:, None, :, None] & b_mask[:, None, None, :]
    return jnp.where(both, jnp.exp(-0.5 * jnp.maximum(distance, 0.0)), 0.0)

  core = kernel(landmarks, landmarks, used, used)
  eye = jnp.eye(num_landmarks, dtype=x.dtype)[None, None]
  core = core + regularisation * eye
  norm = jnp.sum(core, axis=-1) ** -0.5
  core = norm[..., :, None] * core * norm[..., None, :]
  right = kernel(landmarks, y, used, mask)
  summary = jnp.einsum("bnms,bsnv->bnmv", right, v, precision="highest")
  inverse = iterative_inverse(core, iterations)
  summary = norm[..., None] * jnp.einsum(
    "bnlm,bnmv->bnlv", inverse, norm[..., None] * summary, precision="highest"
  )
  left = kernel(x, landmarks, mask, used)
  return jnp.einsum("bntl,bnlv->btnv", left, summary, precision="highest")
