"""Discretely induced features: monomials of random degrees."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.scipy.special import i0e

from spectraformer_jax.components.base import (
  COMPONENTS,
  ComponentInfo,
  masked_mean,
  project,
)
from spectraformer_jax.components.data_dependent import DataDependent
from spectraformer_jax.components.discrete_laws import (
  P_RANGE,
  RATE_RANGE,
  geometric_counts,
  optimal_p,
  poisson_counts,
  stirling_rest,
)
from spectraformer_jax.typing import Array, LogFeatures, PyTree
from spectraformer_jax.weight_matrices import stored_uniforms

# Below this a coordinate counts as zero: its logarithm is cut off there, and
# its gradient is zero, so that neither is infinite.
SMALLEST = 1e-30

# Coordinates in one product: degrees times logarithms reach a thousand.
SUMMED_AT_ONCE = 16


class Discrete(DataDependent):
  """Base of PoisRF and GeomRF: products of powers x_l ** n_l.

  Stored rows are uniforms; `counts` makes them the degrees n ``[M, H]`` once
  the parameter of their law is known. They take no gradient, and they are steps
  in it: stats that differ in a last digit can move a degree by one, to another
  draw of the same law.
  """

  def counts(self, uniform: Array, parameters: PyTree) -> Array:
    """Degrees n ``[M, H]``, float32, from uniforms of that shape."""
    raise NotImplementedError

  def mean_count(self, parameters: PyTree) -> Array:
    """Mean of a degree n: r^2, r the size of x that such degrees suit.

    Powers are of x / r: they and what makes up for r stay near 1, where those
    of x would cost float32 its last digits.
    """
    raise NotImplementedError

  def row_term(self, counts: Array, parameters: PyTree) -> Array:
    """``[M]``: log-features are it plus sum_l (n_l log(x_l/r) + r^2/2)."""
    raise NotImplementedError

  def shifted(self, x: Array, parameters: PyTree) -> tuple[Array, Array]:
    """What the powers see of x, and log-factors ``[..., H]`` to be summed."""
    del parameters
    return x, jnp.zeros_like(x)

  def typical_moments(self, head_dim: int) -> PyTree:
    """Moments of unit-variance, unscaled normal queries and keys."""
    deviation = head_dim**-0.25
    size = deviation * math.sqrt(2.0 / math.pi)
    values = {
      "square": deviation**2,
      "size": size,
      "mean": 0.0,
    }
    both = {
      f"{side}_{name}": value
      for name, value in values.items()
      for side in ("query", "key")
    }
    others = {
      "square_product": deviation**4,
      "size_product": size**2,
      "square_mean": 0.0,
      "mean_square": 0.0,
      "cross": 0.0,
      "least": -3.0 * deviation,
    }
    return {
      name: jnp.full((head_dim,), value, jnp.float32)
      for name, value in (both | others).items()
    }

  def scatter(self, query_mean, key_mean):
    """See `KernelComponent.scatter`: squares, which add up."""
    return {
      "query_square": jnp.square(query_mean),
      "key_square": jnp.square(key_mean),
    }

  def constant(self, head_dim):
    """See `DataDependent.constant`."""
    return self.solve(self.typical_moments(head_dim))

  def realise_rows(self, rows, num_features, state):
    """See `Component.realise_rows`: uniforms to degrees."""
    del num_features
    parameters = self.parameters(state, rows.w.shape[-1])
    counts = self.counts(stored_uniforms.to_uniform(rows.w), parameters)
    return rows._replace(w=jax.lax.stop_gradient(counts))

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    del side
    parameters = self.parameters(state, x.shape[-1])
    powers, log_factor = self.shifted(x, parameters)
    counts, mean = rows.w, self.mean_count(parameters)
    log_powers = log_size(powers) - 0.5 * jnp.log(mean)
    # At |x|^2 = 200 sums of the order of a thousand cancel, and with them the
    # fourth digit of a float32 feature. They are added up coordinate by
    # coordinate, where they are small, and only what n differs from a usual
    # count (an integer: the difference is exact) is left to the projection.
    usual = jnp.round(mean)
    whole = usual * log_powers + (0.5 * mean + log_factor)
    exponent = _project_in_parts(log_powers, counts - usual)
    exponent += self.row_term(counts, parameters)[None, :]
    token = jnp.sum(whole, axis=-1, keepdims=True) + self.gaussian_shift(x)
    negative = (powers < 0.0).astype(x.dtype)
    odd = project(negative, jnp.mod(counts, 2.0))
    sign = 1.0 - 2.0 * jnp.mod(odd, 2.0)
    return LogFeatures(exponent + token, sign)

  def pair_moment(self, product: Array, parameters: PyTree) -> Array:
    """Log E Z^2 ``[...]`` for coordinate products x_l y_l ``[..., H]``."""
    raise NotImplementedError

  def softmax_log_second_moment(self, x, y, state):
    """See `KernelComponent.softmax_log_second_moment`."""
    parameters = self.parameters(state, x.shape[-1])
    x, query_factor = self.shifted(x, parameters)
    y, key_factor = self.shifted(y, parameters)
    factor = 2.0 * jnp.sum(query_factor + key_factor, axis=-1)
    return factor + self.pair_moment(x * y, parameters)


def add_to_products(moments: PyTree, added: PyTree, name: str) -> PyTree:
  """Moments with those of both sides grown, and their product with them.

  Args:
    moments: with f"query_{name}", f"key_{name}" and f"{name}_product".
    added: what to add to the first two.
    name: "square" or "size".
  """
  query, key = moments[f"query_{name}"], moments[f"key_{name}"]
  new_query = query + added[f"query_{name}"]
  new_key = key + added[f"key_{name}"]
  growth = new_query * new_key - query * key
  return moments | {
    f"query_{name}": new_query,
    f"key_{name}": new_key,
    f"{name}_product": moments[f"{name}_product"] + growth,
  }


def _project_in_parts(x: Array, rows: Array) -> Array:
  """`project` with few terms in each running sum: those sums round."""
  starts = range(0, x.shape[-1], SUMMED_AT_ONCE)
  parts = [slice(start, start + SUMMED_AT_ONCE) for start in starts]
  return sum(project(x[:, part], rows[:, part]) for part in parts)


def log_size(x: Array) -> Array:
  """log|x|, cut off at `SMALLEST`, where the gradient is zero, too."""
  size = jnp.abs(x)
  large = size > SMALLEST
  logarithm = jnp.log(jnp.where(large, size, 1.0))
  return jnp.where(large, logarithm, math.log(SMALLEST))


@COMPONENTS.register("poisrf")
@dataclasses.dataclass(frozen=True)
class PoisRF(Discrete):
  r"""Poisson random features (PoisRF).

  .. math::
    f(n, x) = e^{\lambda H / 2} \prod_l x_l^{n_l} \lambda^{-n_l / 2},
    \qquad n_l \sim \mathrm{Poisson}(\lambda)

  (softmax; the Gaussian kernel multiplies by :math:`e^{-|x|^2/2}`). Unbiased
  for rates and inputs whose degrees the stored uniforms resolve: degrees less
  likely than 2^-24 never come up, which takes :math:`\sum_n (x_l y_l)^n / n!`
  over them off a coordinate's kernel. That is below 1e-3 for rates of 0.1 to 8
  and :math:`|x_l y_l| \le 1`, and 4 % at rate 0.01 and 1. One row has second
  moment
  :math:`\exp(\lambda H + \sum_l x_l^2 y_l^2 / \lambda)`; the mean of its log
  over all pairs is least at :math:`\lambda = (\frac1H \sum_l
  \mathrm{mean}_i x_{il}^2\, \mathrm{mean}_j y_{jl}^2)^{1/2}`, which
  "batch" and "ema" take, within [0.01, 8].

  Features are signed, so the normalizer of attention can come out near zero or
  negative; it is kept away from zero, which biases the output where that
  happens and doubles the cost of the sums. Gradients contain n_l / x_l: finite,
  but huge where a coordinate is tiny (zero below 1e-30). Rows depend on the
  statistics: uniforms are stored, and inverted through the Poisson cdf, M H 80
  comparisons a head.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where the rate comes from: "batch", "ema", "learned" or
      "constant". In the gradient of a learned rate the degrees count as
      constants.

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, discretely induced
    features (2205.15317);
    the optimum over all pairs is not the paper's.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("poisrf", "iid", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jnp.ones((1, 3, 1, 4)) / 2
    >>> stats = fm.calibrate(v, x, x)
    >>> round(float(stats["component"]["rate"][0, 0]), 6)
    0.25
    >>> fm.apply(v, x, side="key", stats=stats).shape
    (1, 3, 1, 16)
  """

  info = ComponentInfo(
    name="poisrf",
    family="discrete",
    estimates="softmax or Gaussian kernel",
    formula="exp(lam H/2) prod_l x_l^n_l lam^(-n_l/2), n_l ~ Poisson(lam)",
    positive=False,
    features="M",
    variance="exp(lam H + sum_l x_l^2 y_l^2/lam) / K^2 - 1",
    cost="H logarithms, a second projection for the signs, M exponentials",
    good_for="kernel estimates at small norms",
    avoid="attention and training: signed, and its gradients explode near 0",
    source="2205.15317, discretely induced features",
    row_law="poisson",
  )

  def init(self, rng, head_dim):
    """See `Component.init`: log of the rate if learned."""
    del rng
    if self.statistics != "learned":
      return {}
    return {"log_rate": jnp.log(self.constant(head_dim)["rate"])}

  def from_params(self, params):
    """See `DataDependent.from_params`."""
    return {"rate": jnp.clip(jnp.exp(params["log_rate"]), *RATE_RANGE)}

  def moments(self, query, key, query_mask, key_mask):
    """See `Component.moments`."""
    query_square = masked_mean(jnp.square(query), query_mask)
    key_square = masked_mean(jnp.square(key), key_mask)
    return {
      "query_square": query_square,
      "key_square": key_square,
      "square_product": query_square * key_square,
    }

  def add_scatter(self, moments, scatter):
    """See `KernelComponent.add_scatter`; taken as independent of moments."""
    return add_to_products(moments, scatter, "square")

  def solve(self, moments):
    """See `Component.solve`."""
    mean = jnp.mean(moments["square_product"])
    return {"rate": jnp.clip(jnp.sqrt(mean), *RATE_RANGE)}

  def counts(self, uniform, parameters):
    """See `Discrete.counts`."""
    return poisson_counts(uniform, parameters["rate"])

  def mean_count(self, parameters):
    """See `Discrete.mean_count`."""
    return parameters["rate"]

  def row_term(self, counts, parameters):
    """See `Discrete.row_term`: none, as r^2 is the rate."""
    del parameters
    return jnp.zeros(counts.shape[:1], counts.dtype)

  def pair_moment(self, product, parameters):
    """See `Discrete.pair_moment`."""
    rate, head_dim = parameters["rate"], product.shape[-1]
    return rate * head_dim + jnp.sum(jnp.square(product), axis=-1) / rate


@COMPONENTS.register("geomrf")
@dataclasses.dataclass(frozen=True)
class GeomRF(Discrete):
  r"""Geometric random features (GeomRF).

  .. math::
    f(n, x) = p^{-H/2} \prod_l x_l^{n_l} (1-p)^{-n_l/2} (n_l!)^{-1/2},
    \qquad P(n_l = n) = p (1 - p)^n

  (softmax; the Gaussian kernel multiplies by :math:`e^{-|x|^2/2}`). Unbiased
  for p and inputs whose degrees the stored uniforms resolve, see
  :class:`PoisRF`: what they miss is below 1e-3 for p of 0.2 to 0.9 and
  :math:`|x_l y_l| \le 1`, 2 % at p = 0.99 and 1, 5 % at p = 0.9 and 4. One row
  has second moment
  :math:`p^{-H} \prod_l I_0(2 |x_l y_l| / \sqrt{1-p})`. "batch" and "ema" take
  the p that minimises its log at :math:`|x_l y_l| = \mathrm{mean}_i |x_{il}|\,
  \mathrm{mean}_j |y_{jl}|`, found on a grid over [0.001, 0.99]: exact for one
  pair, a surrogate for a set (the exact mean would cost T S H).

  Features are signed, so the normalizer of attention can come out near zero or
  negative; it is kept away from zero, which biases the output where that
  happens and doubles the cost of the sums. Gradients contain n_l / x_l: finite,
  but huge where a coordinate is tiny (zero below 1e-30).

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where p comes from: "batch", "ema", "learned" or "constant". In
      the gradient of a learned p the degrees count as constants.

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, discretely induced
    features (2205.15317).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("geomrf", "iid", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jnp.ones((1, 3, 1, 4)) / 2
    >>> stats = fm.calibrate(v, x, x)
    >>> bool(0.7 < stats["component"]["p"][0, 0] < 0.9)
    True
  """

  info = ComponentInfo(
    name="geomrf",
    family="discrete",
    estimates="softmax or Gaussian kernel",
    formula=(
      "p^(-H/2) prod_l x_l^n_l (1-p)^(-n_l/2) n_l!^(-1/2), "
      "P(n_l = n) = p (1-p)^n"
    ),
    positive=False,
    features="M",
    variance="p^-H prod_l I_0(2|x_l y_l|/sqrt(1-p)) / K^2 - 1",
    cost="H logarithms, a second projection for the signs, M exponentials",
    good_for="kernel estimates at unit variance: less variance than posrf and "
    "poisrf there, not at small norms",
    avoid="attention and training: signed, and its gradients explode near 0",
    source="2205.15317, discretely induced features",
    row_law="geometric",
  )

  def init(self, rng, head_dim):
    """See `Component.init`: logit of p if learned."""
    del rng
    if self.statistics != "learned":
      return {}
    p = self.constant(head_dim)["p"]
    return {"p_logit": jnp.log(p) - jnp.log1p(-p)}

  def from_params(self, params):
    """See `DataDependent.from_params`."""
    return {"p": jnp.clip(jax.nn.sigmoid(params["p_logit"]), *P_RANGE)}

  def moments(self, query, key, query_mask, key_mask):
    """See `Component.moments`."""
    query_size = masked_mean(jnp.abs(query), query_mask)
    key_size = masked_mean(jnp.abs(key), key_mask)
    return {
      "query_size": query_size,
      "key_size": key_size,
      "size_product": query_size * key_size,
    }

  def add_scatter(self, moments, scatter):
    """See `KernelComponent.add_scatter`; as if all were Gaussian."""
    grown = {}
    for side in ("query", "key"):
      size, square = moments[f"{side}_size"], scatter[f"{side}_square"]
      square = jnp.square(size) + 2.0 / math.pi * jnp.maximum(square, 0.0)
      grown[f"{side}_size"] = jnp.sqrt(square) - size
    return add_to_products(moments, grown, "size")

  def solve(self, moments):
    """See `Component.solve`."""
    return {"p": optimal_p(moments["size_product"])}

  def counts(self, uniform, parameters):
    """See `Discrete.counts`."""
    return geometric_counts(uniform, parameters["p"])

  def mean_count(self, parameters):
    """See `Discrete.mean_count`."""
    return (1.0 - parameters["p"]) / parameters["p"]

  def row_term(self, counts, parameters):
    """See `Discrete.row_term`.

    -1/2 of the sum of log(n! p^(n+1)) + r^2, its large terms joined.
    """
    p, mean = parameters["p"], self.mean_count(parameters)
    # No logarithm of 0, whose gradient would be NaN.
    log_ratio = jnp.log(jnp.maximum(counts, 1.0) / mean)
    terms = counts * log_ratio - (counts - mean)
    terms += stirling_rest(counts) + counts * jnp.log1p(-p) + jnp.log(p)
    return -0.5 * jnp.sum(terms, axis=-1)

  def pair_moment(self, product, parameters):
    """See `Discrete.pair_moment`."""
    p, head_dim = parameters["p"], product.shape[-1]
    argument = 2.0 * jnp.abs(product) / jnp.sqrt(1.0 - p)
    log_bessel = jnp.log(i0e(argument)) + argument
    return jnp.sum(log_bessel, axis=-1) - head_dim * jnp.log(p)
