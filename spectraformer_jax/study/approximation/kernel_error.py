"""How far products of features are from the kernel they estimate."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.components import Component, ComponentState
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.vmap_heads import (
  lead_with_batch,
  over_examples_and_heads,
)
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  LogFeatures,
  PyTree,
)


def has_kernel(feature_map: FeatureMap) -> bool:
  """Whether the map estimates a fixed kernel of two vectors.

  Learnt maps, and maps whose features depend on the position, estimate none.
  """
  learnable = feature_map.info.learnable
  return not (learnable or feature_map.component.info.positional)


@functools.partial(jax.jit, static_argnums=0)
def kernel_ratios(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  x: Array,
  y: Array,
  stats: PyTree,
) -> Array:
  """Returns the estimate divided by the kernel, for all pairs of points.

  Computes in the log domain, since the estimate or the kernel may overflow
  float32 where their ratio does not.

  Args:
    feature_map: one with a kernel; see `has_kernel`.
    variables: from `init`.
    x: queries ``[B, T, N, H]`` float32, scaled.
    y: keys ``[B, S, N, H]`` float32, scaled.
    stats: from `calibrate`.

  Returns:
    ``[B, N, T, S]`` float32: infinite where a ratio overflows, NaN where the
    kernel is zero.
  """
  component = feature_map.component
  log_kernel, sign = _over_heads(
    lambda state, x, y: _log_kernel(component, state, x, y)
  )(variables, x, y, stats)
  phi = feature_map.log_features(variables, x, side="query", stats=stats)
  psi = feature_map.log_features(variables, y, side="key", stats=stats)
  psi = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), psi)

  def one_query(inputs: tuple[LogFeatures, Array]) -> Array:
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
  # Infinite terms of both signs add up to NaN: the estimate is useless, so its
  # ratio counts as infinite.
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
  """Returns the relative mean squared error for independent rows of W.

  Uses the closed form of `Component.log_second_moment`. Takes the arguments of
  `kernel_ratios`, and returns an array of the same shape.

  Raises:
    NotImplementedError: no formula is known.
  """
  component, num_rows = feature_map.component, feature_map.num_features
  if num_rows is None:
    raise NotImplementedError("the map has no rows")

  def log_ratio(state: ComponentState, x: Array, y: Array) -> Array:
    second = component.log_second_moment(x[:, None], y[None], state)
    return second - 2.0 * _log_kernel(component, state, x, y)[0]

  log_ratios = _over_heads(log_ratio)(variables, x, y, stats)
  return jnp.expm1(log_ratios) / num_rows


def _log_kernel(
  component: Component, state: ComponentState, x: Array, y: Array
) -> tuple[Array, Array]:
  """Returns log |kernel| and the kernel's sign, ``[T, S]`` each."""
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


def _over_heads(
  function: Callable[[ComponentState, Array, Array], Any],
) -> Callable[[FeatureVariables, Array, Array, PyTree], Any]:
  """Maps a function of one head over examples and heads.

  Args:
    function: of the state, x ``[T, H]`` and y ``[S, H]``; returns ``[T, S]``.

  Returns:
    A function of variables, x ``[B, T, N, H]``, y ``[B, S, N, H]`` and stats,
    which returns ``[B, N, T, S]``.
  """

  def one_head(
    variables: FeatureVariables, stats: PyTree, x: Array, y: Array
  ) -> Any:
    params, random = (tree.get("component", {}) for tree in variables)
    stats = stats.get("component", ())
    return function(ComponentState(params, random, stats), x, y)

  def mapped(
    variables: FeatureVariables, x: Array, y: Array, stats: PyTree
  ) -> Any:
    x, y = jnp.swapaxes(x, 1, 2), jnp.swapaxes(y, 1, 2)
    return over_examples_and_heads(one_head)(
      lead_with_batch(variables), stats or {}, x, y
    )

  return mapped
