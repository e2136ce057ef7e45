"""Positive discrete features: the same, of coordinates shifted above zero."""

import dataclasses

import jax.numpy as jnp

from spectraformer_jax.components.base import (
  COMPONENTS,
  covariance,
  masked_mean,
)
from spectraformer_jax.components.discrete import Discrete, GeomRF, PoisRF
from spectraformer_jax.typing import Array

# How far below the least coordinate the shift lies: features then are positive
# and gradients at the least coordinate are not larger than 1 / MARGIN.
MARGIN = 1e-3


class Shifted(Discrete):
  """What the plus forms have in common: one shift c for queries and keys.

  exp(x.y) = exp((x - c).(y - c)) exp(x.c - |c|^2/2) exp(y.c - |c|^2/2).
  """

  @property
  def info(self):
    """Facts; not positive, as the shift may be above what is mapped."""
    return dataclasses.replace(
      super().info,
      name=f"{super().info.name}_plus",
      formula=f"exp(x.c - |c|^2/2) times, at x - c: {super().info.formula}",
      variance=f"{super().info.variance}, at x - c and y - c",
      good_for="a discrete map that is positive where stats saw all vectors",
      avoid=(
        "causal attention with statistics='batch'; training, as gradients are "
        "large at the least coordinates"
      ),
    )

  def init(self, rng, head_dim):
    """See `Component.init`: the shift, beside the law's parameter."""
    params = super().init(rng, head_dim)
    if self.statistics == "learned":
      params["shift"] = self.constant(head_dim)["shift"]
    return params

  def from_params(self, params):
    """See `DataDependent.from_params`."""
    return super().from_params(params) | {"shift": params["shift"]}

  def moments(self, query, key, query_mask, key_mask):
    """See `Component.moments`."""
    query_mean = masked_mean(query, query_mask)
    key_mean = masked_mean(key, key_mask)
    return super().moments(query, key, query_mask, key_mask) | {
      "query_mean": query_mean,
      "key_mean": key_mean,
      "cross": query_mean * key_mean,
      "least": _least(query, key, query_mask, key_mask),
    }

  def scatter(self, query_mean, key_mean):
    """See `KernelComponent.scatter`."""
    return super().scatter(query_mean, key_mean) | {
      "cross": query_mean * key_mean
    }

  def add_scatter(self, moments, scatter):
    """See `KernelComponent.add_scatter`; least values are about centres."""
    cross = moments["cross"] + scatter["cross"]
    return super().add_scatter(moments, scatter) | {"cross": cross}

  def query_features(self, x, rows, state):
    """See `Component.query_features`: of queries inside the keys' range.

    Statistics of the batch need not have seen a query (attention takes those of
    the visible keys). A coordinate below their least one is put there, so that
    no weight is negative.
    """
    if self.statistics == "batch":
      shift = self.parameters(state, x.shape[-1])["shift"]
      x = jnp.maximum(x, shift[None, :] + MARGIN)
    return super().query_features(x, rows, state)

  def shifted(self, x, parameters):
    """See `Discrete.shifted`."""
    shift = jnp.reshape(parameters["shift"], (1,) * (x.ndim - 1) + (-1,))
    # x.c - |c|^2/2, without the digits that cancel.
    return x - shift, (x - 0.5 * shift) * shift


def _least(query, key, query_mask, key_mask) -> Array:
  """Least value of each coordinate, ``[H]``; 0 where no position counts."""
  least = jnp.full(query.shape[-1:], jnp.inf, query.dtype)
  for x, mask in ((query, query_mask), (key, key_mask)):
    if mask is not None:
      x = jnp.where(mask[:, None], x, jnp.inf)
    least = jnp.minimum(least, jnp.min(x, axis=0))
  return jnp.where(jnp.isfinite(least), least, 0.0)


@COMPONENTS.register("poisrf_plus")
@dataclasses.dataclass(frozen=True)
class PoisRFPlus(Shifted, PoisRF):
  r"""Positive Poisson random features (PoisRF+).

  .. math::
    f^+(n, x) = e^{x \cdot c - |c|^2/2} f(n, x - c)

  with f of :class:`PoisRF` and c, one vector for all queries and keys of a
  head, just below the least value of each coordinate: every coordinate of x - c
  is then positive, and so are all features. (The Gaussian kernel does not
  change when both sides are shifted.) The second moment of one row is that of
  :class:`PoisRF` at x - c and y - c, usually far larger: the price of the sign
  (:class:`GeomRFPlus` pays it as well).

  Unbiased for every c. Positivity holds where c is below all that is mapped:
  with ``stats=fm.calibrate(variables, query, key)`` of those queries and keys.
  A running average of minima, a learned or a constant c (three standard
  deviations) is below most coordinates but not all. The others enter with their
  sign, so that the estimate stays unbiased, and attention guards its normalizer
  as for any signed map.

  Attention's own statistics are of the visible keys alone. There, with "batch",
  a query's coordinate below the least of them is moved up to it: no weight is
  negative, and those of that query are biased; ``stats=fm.calibrate(variables,
  query, key)`` counts queries as well, and moves none.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where rate and c come from: "batch", "ema", "learned" or
      "constant".

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, positive discretely
    induced features (2205.15317).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("poisrf_plus", "iid", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jax.random.normal(jax.random.key(1), (1, 9, 1, 4))
    >>> stats = fm.calibrate(v, x, x)
    >>> bool((fm.apply(v, x, side="key", stats=stats) >= 0).all())
    True
  """

  def moments(self, query, key, query_mask, key_mask):
    """See `Component.moments`: with the products that a shift brings in."""
    moments = super().moments(query, key, query_mask, key_mask)
    return moments | {
      "square_mean": moments["query_square"] * moments["key_mean"],
      "mean_square": moments["query_mean"] * moments["key_square"],
    }

  def solve(self, moments):
    """See `Component.solve`: the law's parameter is that of shifted data."""
    shift = moments["least"] - MARGIN
    squares, means = (
      [moments[f"{side}_{name}"] for side in ("query", "key")]
      for name in ("square", "mean")
    )
    query, key = (
      _square_about(square, mean, shift)
      for square, mean in zip(squares, means, strict=True)
    )
    # Of the examples' (x^2 - 2 c x + c^2) and the same of y.
    varying = covariance(moments["square_product"], squares[0] * squares[1])
    varying -= (
      2.0 * shift * covariance(moments["square_mean"], squares[0] * means[1])
    )
    varying -= (
      2.0 * shift * covariance(moments["mean_square"], means[0] * squares[1])
    )
    varying += (
      4.0
      * jnp.square(shift)
      * covariance(moments["cross"], means[0] * means[1])
    )
    product = jnp.maximum(query * key + varying, 0.0)
    return super().solve({"square_product": product}) | {"shift": shift}


@COMPONENTS.register("geomrf_plus")
@dataclasses.dataclass(frozen=True)
class GeomRFPlus(Shifted, GeomRF):
  r"""Positive geometric random features (GeomRF+).

  .. math::
    f^+(n, x) = e^{x \cdot c - |c|^2/2} f(n, x - c)

  with f of :class:`GeomRF` and c as for :class:`PoisRFPlus`: all that is said
  there of positivity holds here, too. The second moment of one row is that of
  :class:`GeomRF` at x - c and y - c.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where p and c come from: "batch", "ema", "learned" or
      "constant".

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, positive discretely
    induced features (2205.15317).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("geomrf_plus", "iid", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jax.random.normal(jax.random.key(1), (1, 9, 1, 4))
    >>> stats = fm.calibrate(v, x, x)
    >>> bool((fm.apply(v, x, side="key", stats=stats) >= 0).all())
    True
  """

  def solve(self, moments):
    """See `Component.solve`: the law's parameter is that of shifted data."""
    shift = moments["least"] - MARGIN
    query_mean, key_mean = moments["query_mean"], moments["key_mean"]
    # All coordinates lie above the shift, so their sizes are their distances.
    product = jnp.abs(query_mean - shift) * jnp.abs(key_mean - shift)
    product += covariance(moments["cross"], query_mean * key_mean)
    product = jnp.maximum(product, 0.0)
    return super().solve({"size_product": product}) | {"shift": shift}


def _square_about(square: Array, mean: Array, shift: Array) -> Array:
  """Mean of (x - shift)^2 from those of x^2 and x."""
  variance = jnp.maximum(square - jnp.square(mean), 0.0)
  return variance + jnp.square(mean - shift)
