"""How far products of features are from the kernel they estimate."""

import functools

import jax
import jax.numpy as jnp

from spectraformer_jax.components import ComponentState
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.vmap_heads import (
  lead_with_batch,
  over_examples_and_heads,
)
from spectraformer_jax.typing import Array, FeatureVariables, PyTree


def has_kernel(feature_map: FeatureMap) -> bool:
  """Whether one kernel of two vectors is what the map estimates.

  Not so for learnt matrices, nor where features depend on the position.
  """
  learnable = feature_map.weight_matrix.info.learnable
  return not (learnable or feature_map.component.info.positional)


@functools.partial(jax.jit, static_argnums=0)
def kernel_ratios(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  x: Array,
  y: Array,
  stats: PyTree,
) -> Array:
  """Estimate over kernel, for all pairs of points.

  Computed in the log domain: the estimate and the kernel may each be outside
  of float32 where their ratio is not.

  Args:
    feature_map: for which `has_kernel` holds.
    variables: from `init`.
    x: queries ``[B, T, N, H]`` float32, scaled.
    y: keys ``[B, S, N, H]`` float32, scaled.
    stats: from `calibrate`.

  Returns:
    ``[B, N, T, S]`` float32: infinite where an estimate is too large for it,
    NaN where the kernel is zero.
  """
  component = feature_map.component
  log_kernel, sign = _over_heads(
    lambda state, x, y: _log_kernel(component, state, x, y)
  )(variables, x, y, stats)
  phi = feature_map.log_features(variables, x, side="query", stats=stats)
  psi = feature_map.log_features(variables, y, side="key", stats=stats)
  psi = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), psi)

  def one_query(inputs):
    phi, log_kernel = inputs  # [B, N, F], [B, N, S]
    log_size = phi.log_magnitude[:, :, None] + psi.log_magnitude
    terms = jnp.exp(log_size - log_kernel[..., None])
    if psi.factor is not None:
      terms *= psi.factor
    if phi.factor is not None:
      terms *= phi.factor[:, :, None]
    return jnp.sum(terms, axis=-1)

  ratios = jax.lax.map(
    one_query,
    (
      jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), phi),
      jnp.moveaxis(log_kernel, 2, 0),
    ),
  )
  ratios = sign * jnp.moveaxis(ratios, 0, 2)
  # A sum of infinite terms of both signs is no number, but no accuracy either.
  ratios = jnp.where(jnp.isnan(ratios), jnp.inf, ratios)
  return jnp.where(sign == 0.0, jnp.nan, ratios)


@functools.partial(jax.jit, static_argnums=0)
def independent_rows_mse(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  x: Array,
  y: Array,
  stats: PyTree,
) -> Array:
  """The relative mean squared error if the rows of W were independent.

  The closed form of `Component.log_second_moment`. Arguments and result as in
  `kernel_ratios`.

  Raises:
    NotImplementedError: no formula is known.
  """
  component = feature_map.component

  def log_ratio(state, x, y):
    second = component.log_second_moment(x[:, None], y[None], state)
    return second - 2.0 * _log_kernel(component, state, x, y)[0]

  log_ratios = _over_heads(log_ratio)(variables, x, y, stats)
  return jnp.expm1(log_ratios) / feature_map.num_features


def _log_kernel(component, state, x, y):
  """Logarithm of the kernel's size, and its sign: ``[T, S]`` each."""
  x, y = x[:, None], y[None]
  name = getattr(component, "kernel", None)
  if name == "softmax":
    log = jnp.sum(x * y, axis=-1)
  elif name == "gaussian":
    log = -0.5 * jnp.sum(jnp.square(x - y), axis=-1)
  else:
    kernel = component.kernel_value(x, y, state)
    return jnp.log(jnp.abs(kernel)), jnp.sign(kernel)
  return log, jnp.ones_like(log)


def _over_heads(function):
  """Maps function(state, x ``[T, H]``, y ``[S, H]``) -> ``[T, S]`` over heads.

  The result takes variables, x ``[B, T, N, H]``, y and stats.
  """

  def one_head(variables, stats, x, y):
    params, random = (tree.get("component", {}) for tree in variables)
    stats = stats.get("component", ())
    return function(ComponentState(params, random, stats), x, y)

  def mapped(variables, x, y, stats):
    x, y = jnp.swapaxes(x, 1, 2), jnp.swapaxes(y, 1, 2)
    return over_examples_and_heads(one_head)(
      lead_with_batch(variables), stats or {}, x, y
    )

  return mapped
