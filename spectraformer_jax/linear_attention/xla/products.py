"""The matrix products of linear attention, with gradients that are cheap.

On a CPU a product that reads its wide operand across rows takes up to twice as
long, and autodiff asks for such ones. These, and what their gradients need, are
written with the small operand turned instead.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.layouts import once, turned
from spectraformer_jax.linear_attention.state import divide, exponential_of
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


class Products(NamedTuple):
  """What chunks compute with, by the derivatives that are taken of it.

  Attributes:
    keys_times_values: see there.
    queries_times_state: see there.
    mean_of_values: see there.
    exponential: of log-features and the features made of them, the features.
    step: wraps the body of a loop over steps.
  """

  keys_times_values: Callable
  queries_times_state: Callable
  mean_of_values: Callable
  exponential: Callable
  step: Callable


def _plain_mean(sums: Array, known: None) -> tuple[Array, Array]:
  """`mean_of_values`."""
  del known
  return divide(sums[..., :-1], sums[..., -1:]), sums[..., -1]


def _plain_exponential(log_magnitude: Array, features: Array) -> Array:
  """The features, with exact derivatives of any order."""
  fixed = jax.lax.stop_gradient
  return jnp.exp(log_magnitude - fixed(log_magnitude)) * fixed(features)


_CHEAP = (keys_times_values, queries_times_state, mean_of_values)

# For a forward pass, and for one backward pass: JAX may drop the rule of
# `exponential_of`, and so the derivative, where it takes two through a loop.
FORWARD = Products(*_CHEAP, lambda _, features: once(features), lambda f: f)
BACKWARD = Products(*_CHEAP, exponential_of, lambda f: f)

# As JAX differentiates them, in any mode and order. Features are made again
# there as well, instead of being kept.
PLAIN = Products(
  lambda psi, value: jnp.swapaxes(psi, -1, -2) @ value,
  jnp.matmul,
  _plain_mean,
  _plain_exponential,
  functools.partial(jax.checkpoint, prevent_cse=False),
)
