"""Nystromformer: approximates the softmax matrix through landmarks."""

import functools

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.baselines.masked import (
  MaskedInputs,
  iterative_inverse,
  masked_inputs,
  number_positions,
  on_shards,
)
from spectraformer_jax.kernels import masked_softmax
from spectraformer_jax.typing import Array


def nystromformer_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  num_landmarks: int = 64,
  iterations: int = 6,
  scale: float | None = None,
  key_mask: Array | None = None,
) -> Array:
  r"""Nystrom approximation of softmax attention, O(T m).

  .. math::
    O = \operatorname{softmax}(Q \tilde K^\top)\;
        \operatorname{softmax}(\tilde Q \tilde K^\top)^+\;
        \operatorname{softmax}(\tilde Q K^\top)\, V

  Landmarks are means over m segments of the *real* positions of each example,
  so they do not depend on padding. An example of fewer than m positions has one
  landmark per position, which is exact attention up to the error of the
  iterative inverse. The depthwise convolution that the authors' code adds to
  the output is left out.

  Args:
    query: ``[B, T, N, H]``, any float dtype.
    key: ``[B, T, N, H]``.
    value: ``[B, T, N, V]``.
    num_landmarks: m.
    iterations: of `iterative_inverse`.
    scale: None means ``1 / sqrt(H)``.
    key_mask: ``[B, T]`` bool, True at real positions.

  Returns:
    ``[B, T, N, V]`` in value's dtype, computed in float32 at least. Zeros for
    an example without visible keys.

  Raises:
    ValueError: shapes that do not agree, or sizes that are not positive.

  Example:
    >>> q = jnp.ones((1, 6, 2, 4))
    >>> nystromformer_attention(q, q, q, num_landmarks=2).shape
    (1, 6, 2, 4)

  References:
    Xiong et al., `Nystromformer <https://arxiv.org/abs/2102.03902>`_, 2021,
    equations 11 and 13.
  """
  checks.check_positive_int("num_landmarks", num_landmarks)
  inputs = masked_inputs(query, key, value, scale=scale, key_mask=key_mask)
  attend = functools.partial(
    _attend, num_landmarks=num_landmarks, iterations=iterations
  )
  return on_shards(attend, inputs).astype(value.dtype)


def _attend(
  inputs: MaskedInputs, *, num_landmarks: int, iterations: int
) -> Array:
  """Computes `nystromformer_attention` of prepared inputs."""
  x, y, v, mask = inputs
  number, count = number_positions(mask)
  # Row m of `member` averages over segment m; masked positions have none (-1).
  segment = jnp.where(mask, number * num_landmarks // count, -1)
  member = jax.nn.one_hot(segment, num_landmarks, axis=1, dtype=x.dtype)
  sizes = jnp.sum(member, axis=2)
  member /= jnp.maximum(sizes, 1.0)[:, :, None]
  means = lambda array: jnp.einsum(
    "bms,bsnh->bmnh", member, array, precision="highest"
  )
  x_mean, y_mean = means(x), means(y)
  landmark = sizes > 0.0

  def weights(queries: Array, keys: Array, visible: Array) -> Array:
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys, precision="highest")
    return masked_softmax(scores, visible[:, None, None, :])

  # A missing landmark is zero, to which softmax would give uniform weights.
  is_landmark = landmark[:, None, :, None]
  core = jnp.where(is_landmark, weights(x_mean, y_mean, landmark), 0.0)
  right = jnp.where(is_landmark, weights(x_mean, y, mask), 0.0)
  summary = jnp.einsum("bnms,bsnv->bnmv", right, v, precision="highest")
  inverse = iterative_inverse(core, iterations)
  summary = jnp.einsum("bnlm,bnmv->bnlv", inverse, summary, precision="highest")
  left = weights(x, y_mean, landmark)
  return jnp.einsum("bntl,bnlv->btnv", left, summary, precision="highest")
