"""Positive discrete features, of coordinates shifted above zero."""

import dataclasses

import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.components.discrete import Discrete, GeomRF, PoisRF
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Mask,
  Params,
  PyTree,
  WeightSample,
)

# Distance of the shift from the smallest coordinate. It is above 0, so features
# are positive and gradients are bounded by n / MARGIN.
MARGIN = 1e-3


class ShiftedDiscrete(Discrete):
  """Base of PoisRF+ and GeomRF+: one shift c for queries and keys.

  exp(x.y) = exp((x - c).(y - c)) exp(x.c - |c|^2/2) exp(y.c - |c|^2/2).
  """

  def _info(self) -> base.ComponentInfo:
    """Returns the facts; not positive, since c may exceed a coordinate."""
    facts = super().info
    return dataclasses.replace(
      facts,
      name=f"{facts.name}_plus",
      formula=f"exp(x.c - |c|^2/2) times, at x - c: {facts.formula}",
      variance=f"{facts.variance}, at x - c and y - c",
      good_for="a discrete map that is positive where stats saw all vectors",
      avoid=(
        "causal attention with statistics='batch'; training, as gradients are "
        "large at the least coordinates"
      ),
    )

  info = base.info_from_options(_info)

  @override
  def init_params(self, head_dim: int) -> Params:
    shift = self.constant(head_dim)["shift"]
    return super().init_params(head_dim) | {"shift": shift}

  @override
  def from_params(self, params: Params) -> Params:
    return super().from_params(params) | {"shift": params["shift"]}

  @override
  def moments(
    self, query: Array, key: Array, query_mask: Mask, key_mask: Mask
  ) -> PyTree:
    query_mean = base.masked_mean(query, query_mask)
    key_mean = base.masked_mean(key, key_mask)
    return super().moments(query, key, query_mask, key_mask) | {
      "query_mean": query_mean,
      "key_mean": key_mean,
      "cross": query_mean * key_mean,
      "least": _least(query, key, query_mask, key_mask),
    }

  @override
  def moments_at(self, query: Array, key: Array) -> PyTree:
    return super().moments_at(query, key) | {"cross": query * key}

  @override
  def recentre(self, moments: PyTree, scatter: PyTree) -> PyTree:
    """Leaves "least" as it is: it belongs to the centred vectors."""
    cross = moments["cross"] + scatter["cross"]
    return super().recentre(moments, scatter) | {"cross": cross}

  @override
  def query_features(
    self, x: Array, rows: WeightSample, state: ComponentState
  ) -> LogFeatures:
    """Raises each coordinate of queries to at least the smallest of the keys.

    Attention takes statistics of the visible keys, so with "batch" the shift
    may exceed a query's coordinate, which would make weights negative.
    """
    if self.statistics == "batch":
      shift = self.parameters(state, x.shape[-1])["shift"]
      x = jnp.maximum(x, shift[None, :] + MARGIN)
    return super().query_features(x, rows, state)

  @override
  def split_shift(self, x: Array, parameters: Params) -> tuple[Array, Array]:
    shift = jnp.reshape(parameters["shift"], (1,) * (x.ndim - 1) + (-1,))
    # x.c - |c|^2/2, written without cancellation.
    return x - shift, (x - 0.5 * shift) * shift


def _least(query: Array, key: Array, query_mask: Mask, key_mask: Mask) -> Array:
  """Returns each coordinate's minimum, ``[H]``; 0 if no position counts."""
  least = jnp.full(query.shape[-1:], jnp.inf, query.dtype)
  for x, mask in ((query, query_mask), (key, key_mask)):
    if mask is not None:
      x = jnp.where(mask[:, None], x, jnp.inf)
    least = jnp.minimum(least, jnp.min(x, axis=0))
  return jnp.where(jnp.isfinite(least), least, 0.0)


@base.COMPONENTS.register("poisrf_plus")
@dataclasses.dataclass(frozen=True)
class PoisRFPlus(ShiftedDiscrete, PoisRF):
  r"""Positive Poisson random features (PoisRF+).

  .. math::
    f^+(n, x) = e^{x \cdot c - |c|^2/2} f(n, x - c)

  with f of :class:`PoisRF` and one vector c for all queries and keys of a head,
  just below the minimum of each coordinate. Every coordinate of x - c is then
  positive, and so are all features. (The Gaussian kernel does not change when
  both sides are shifted.) The second moment of one row is that of
  :class:`PoisRF` at x - c and y - c, usually far larger: the price of
  positivity, also for :class:`GeomRFPlus`.

  Unbiased for every c. Features are positive if c is below all coordinates, as
  it is with ``stats=fm.calibrate(variables, query, key)`` of the same queries
  and keys. A running average of minima, a learned or a constant c (three
  standard deviations) is below most coordinates but not all. Coordinates below
  c give signed features, so the estimate stays unbiased, and attention guards
  its normalizer as for any signed map.

  If attention computes the statistics, they are those of the visible keys. With
  "batch", it then raises coordinates of queries to the smallest one of the
  keys: no weight is negative, but the weights of such a query are biased.
  ``stats=fm.calibrate(variables, query, key)`` counts queries as well, so no
  coordinate is raised.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of rate and c: "batch", "ema", "learned" or "constant".

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

  @override
  def moments(
    self, query: Array, key: Array, query_mask: Mask, key_mask: Mask
  ) -> PyTree:
    """Adds the products of means that a shift of the data needs."""
    moments = super().moments(query, key, query_mask, key_mask)
    # The queries' factor comes first in the names.
    return moments | {
      "square_mean": moments["query_square"] * moments["key_mean"],
      "mean_square": moments["query_mean"] * moments["key_square"],
    }

  @override
  def solve(self, moments: PyTree) -> PyTree:
    """Returns the best rate for the shifted data, and the shift."""
    shift = moments["least"] - MARGIN
    query_square, key_square = moments["query_square"], moments["key_square"]
    query_mean, key_mean = moments["query_mean"], moments["key_mean"]
    query = _square_about(query_square, query_mean, shift)
    key = _square_about(key_square, key_mean, shift)
    # Covariance over examples of x^2 - 2 c x + c^2 and y^2 - 2 c y + c^2.
    both = base.covariance(moments["square_product"], query_square * key_square)
    left = base.covariance(moments["square_mean"], query_square * key_mean)
    right = base.covariance(moments["mean_square"], query_mean * key_square)
    cross = base.covariance(moments["cross"], query_mean * key_mean)
    varying = both - 2.0 * shift * left - 2.0 * shift * right
    varying += 4.0 * jnp.square(shift) * cross
    product = jnp.maximum(query * key + varying, 0.0)
    return super().solve({"square_product": product}) | {"shift": shift}


@base.COMPONENTS.register("geomrf_plus")
@dataclasses.dataclass(frozen=True)
class GeomRFPlus(ShiftedDiscrete, GeomRF):
  r"""Positive geometric random features (GeomRF+).

  .. math::
    f^+(n, x) = e^{x \cdot c - |c|^2/2} f(n, x - c)

  with f of :class:`GeomRF` and the c of :class:`PoisRFPlus`, whose docstring
  says when features are positive. The second moment of one row is that of
  :class:`GeomRF` at x - c and y - c.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of p and c: "batch", "ema", "learned" or "constant".

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

  @override
  def solve(self, moments: PyTree) -> PyTree:
    """Returns the best p for the shifted data, and the shift."""
    shift = moments["least"] - MARGIN
    query_mean, key_mean = moments["query_mean"], moments["key_mean"]
    # All coordinates lie above the shift, so their sizes are their distances.
    product = jnp.abs(query_mean - shift) * jnp.abs(key_mean - shift)
    product += base.covariance(moments["cross"], query_mean * key_mean)
    product = jnp.maximum(product, 0.0)
    return super().solve({"size_product": product}) | {"shift": shift}


def _square_about(square: Array, mean: Array, shift: Array) -> Array:
  """Returns the mean of (x - shift)^2 from the means of x^2 and x."""
  variance = jnp.maximum(square - jnp.square(mean), 0.0)
  return variance + jnp.square(mean - shift)
