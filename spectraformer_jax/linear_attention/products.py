"""The matrix products of linear attention, with gradients that are cheap.

On a CPU a product that reads its wide operand across rows takes up to twice as
long, and autodiff asks for such ones. These, and what their gradients need, are
written with the small operand turned instead.
"""

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.layouts import turned
from spectraformer_jax.linear_attention.state import divide
from spectraformer_jax.typing import Array


@jax.custom_vjp
def keys_times_values(psi: Array, value: Array) -> Array:
  """``psi^T value``: ``[..., C, F]`` and ``[..., C, V]`` -> ``[..., F, V]``."""
  return turned(turned(value) @ psi)


def _keys_fwd(psi, value):
  return keys_times_values(psi, value), (psi, value)


def _keys_bwd(operands, gradient):
  psi, value = operands
  return value @ turned(gradient), psi @ gradient


keys_times_values.defvjp(_keys_fwd, _keys_bwd)


@jax.custom_vjp
def queries_times_state(phi: Array, kv: Array) -> Array:
  """``phi kv``: ``[..., C, F]`` and ``[..., F, V]`` -> ``[..., C, V]``."""
  return phi @ kv


def _queries_fwd(phi, kv):
  return queries_times_state(phi, kv), (phi, kv)


def _queries_bwd(operands, gradient):
  phi, kv = operands
  return gradient @ turned(kv), keys_times_values(phi, gradient)


queries_times_state.defvjp(_queries_fwd, _queries_bwd)


@jax.custom_vjp
def mean_of_values(
  sums: Array, known: tuple[Array, Array] | None
) -> tuple[Array, Array]:
  """``sums[..., :V] / sums[..., V]``, zeros where that is 0, and the divisor.

  Args:
    sums: ``[..., C, V + 1]``, of weights times values and of weights.
    known: the result, where it is known and its gradient alone is wanted.

  Returns:
    ``[..., C, V]`` and ``[..., C]``.
  """
  if known is not None:
    return known
  normalizer = sums[..., -1]
  return divide(sums[..., :-1], normalizer[..., None]), normalizer


def _mean_fwd(sums, known):
  out = mean_of_values(sums, known)
  return out, out


def _mean_bwd(result, gradients):
  """Needs the result alone, so the sums are not made again."""
  out, normalizer = result
  d_out, d_normalizer = gradients
  d_values = divide(d_out, normalizer[..., None])
  d_normalizer = d_normalizer - jnp.sum(d_values * out, axis=-1)
  d_sums = jnp.concatenate([d_values, d_normalizer[..., None]], axis=-1)
  return d_sums, None


mean_of_values.defvjp(_mean_fwd, _mean_bwd)
