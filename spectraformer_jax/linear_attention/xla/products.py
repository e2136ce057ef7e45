"""The matrix products of linear attention, with gradients that are as fast.

Features are wide, ``[C, F]``, and values narrow, ``[C, V]``. A product that
reads its wide operand down columns makes XLA for CPUs transpose it entry by
entry, and takes up to twice as long; autodiff asks for such products. Here the
narrow operand is transposed instead, in the products and in their gradients.
To be dropped once the plain products of `EXACT` are as fast in
``benchmarks/attention.py`` (measured in docs/decisions/03-turned-products.md).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.layouts import (
  behind_barrier,
  transposed,
)
from spectraformer_jax.typing import Array


@jax.custom_vjp
def keys_times_values(psi: Array, value: Array) -> Array:
  """Returns ``psi^T value``: ``[..., C, F], [..., C, V] -> [..., F, V]``."""
  return transposed(transposed(value) @ psi)


def _keys_fwd(psi: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
  return keys_times_values(psi, value), (psi, value)


def _keys_bwd(
  operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  psi, value = operands
  return value @ transposed(gradient), psi @ gradient


keys_times_values.defvjp(_keys_fwd, _keys_bwd)


@jax.custom_vjp
def queries_times_state(phi: Array, sums: Array) -> Array:
  """Returns ``phi sums``: ``[..., C, F], [..., F, V] -> [..., C, V]``."""
  return phi @ sums


def _queries_fwd(phi: Array, sums: Array) -> tuple[Array, tuple[Array, Array]]:
  return queries_times_state(phi, sums), (phi, sums)


def _queries_bwd(
  operands: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
  phi, sums = operands
  return gradient @ transposed(sums), keys_times_values(phi, gradient)


queries_times_state.defvjp(_queries_fwd, _queries_bwd)


@jax.custom_jvp
def exponential_of(log_magnitude: Array, features: Array) -> Array:
  """Returns `features`, their own derivative with respect to `log_magnitude`.

  The backward pass then reads them; by autodiff XLA would compute a second exp
  (docs/decisions/04-features-are-their-derivative.md). To be dropped once XLA
  finds the common expression by itself.
  """
  del log_magnitude
  return behind_barrier(features)


@exponential_of.defjvp
def _exponential_of_jvp(
  primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
  out = exponential_of(*primals)
  return out, out * tangents[0]


class Products(NamedTuple):
  """The operations of a pass that FAST and EXACT differentiate differently.

  Attributes:
    keys_times_values: see `keys_times_values`.
    queries_times_state: see `queries_times_state`.
    exponential: returns features with a gradient, given log-features and the
      features that were made of them.
    checkpoint: wraps the body of a loop over steps.
  """

  keys_times_values: Callable[[Array, Array], Array]
  queries_times_state: Callable[[Array, Array], Array]
  exponential: Callable[[Array, Array], Array]
  checkpoint: Callable[[Callable], Callable]


def _exact_exponential(log_magnitude: Array, features: Array) -> Array:
  """Returns `features`, with exact derivatives of any order."""
  fixed = jax.lax.stop_gradient
  return jnp.exp(log_magnitude - fixed(log_magnitude)) * fixed(features)


# For the forward pass and for the backward pass that is written by hand.
# It must not be differentiated twice: JAX may drop the rule of `exponential_of`
# where it differentiates a loop a second time.
FAST = Products(
  keys_times_values, queries_times_state, exponential_of, lambda body: body
)

# For all other derivatives, which JAX takes in any mode and order. Steps are
# checkpointed, so that JAX computes features again instead of saving them.
EXACT = Products(
  lambda psi, value: jnp.swapaxes(psi, -1, -2) @ value,
  jnp.matmul,
  _exact_exponential,
  functools.partial(jax.checkpoint, prevent_cse=False),
)
