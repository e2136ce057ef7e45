"""Exact and uniform attention, and the relative error of an output."""

import functools

import jax.numpy as jnp
import numpy as np

from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.kernels import exact_attention
from spectraformer_jax.typing import Array


def exact_and_uniform(
  arrays: AttentionArrays,
  *,
  kernel: str,
  is_causal: bool,
  scale: float | Array | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Computes the attention that others are compared with.

  Args:
    arrays: with both masks.
    kernel: of exact attention: "softmax" or "gaussian".
    is_causal: query i sees keys 0..i.
    scale: of ``query . key``; None means ``1 / sqrt(H)``.

  Returns:
    Exact attention, and attention that gives all visible keys the same weight;
    ``[B, T, N, V]`` float64, zero at masked queries.
  """
  query, key, value, key_mask, query_mask, _ = arrays
  attend = functools.partial(
    exact_attention, key_mask=key_mask, is_causal=is_causal, scale=scale
  )
  exact = attend(query, key, value, kernel=kernel)
  # Zero queries make all scores equal, so attention is uniform.
  uniform = attend(jnp.zeros_like(query), key, value)
  return zero_masked(exact, query_mask), zero_masked(uniform, query_mask)


def zero_masked(
  out: Array, query_mask: Array | np.ndarray | None
) -> np.ndarray:
  """Returns outputs ``[B, T, N, V]`` in float64, zero at masked queries."""
  out_ = np.asarray(out, np.float64)
  if query_mask is None:
    return out_
  return np.where(np.asarray(query_mask)[:, :, None, None], out_, 0.0)


def relative_error(out: np.ndarray, exact: np.ndarray) -> float:
  """Frobenius norm of the difference over that of `exact`.

  Example:
    >>> relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0]))
    0.2
  """
  return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
