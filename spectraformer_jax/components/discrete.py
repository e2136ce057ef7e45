"""Discretely induced features: monomials of random degrees."""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.scipy.special import i0e
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.components.data_dependent import DataDependent
from spectraformer_jax.components.discrete_laws import (
  P_RANGE,
  RATE_RANGE,
  geometric_degrees,
  optimal_p,
  poisson_degrees,
  stirling_rest,
)
from spectraformer_jax.components.optimal import logit
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Mask,
  Params,
  PyTree,
  Side,
  WeightSample,
)
from spectraformer_jax.weight_matrices import stored_uniforms

# A coordinate of smaller size counts as this size and has no gradient, so that
# neither its logarithm nor the gradient of the logarithm is infinite.
SMALLEST = 1e-30

# Coordinates in one running sum. Terms (degrees times logarithms) reach 1000,
# so a longer sum would round more.
SUMMED_AT_ONCE = 16


class Discrete(DataDependent):
  """Base of PoisRF and GeomRF: products of powers x_l ** n_l.

  Stored rows are uniforms; `degrees` turns them into the degrees n ``[M, H]``
  of a law with a data-dependent parameter. Degrees take no gradient and are
  step functions of the parameter: stats that differ in their last digit can
  change a degree by one, which gives another draw of the same law.
  """

  def degrees(self, uniform: Array, parameters: Params) -> Array:
    """Returns degrees n, float32, of uniforms ``[M, H]``."""
    raise NotImplementedError

  def mean_degree(self, parameters: Params) -> Array:
    """Returns the mean of a degree n, which is also called r^2.

    Features are computed from powers of x / r and a term that undoes the 1 / r.
    Both are near 1, whereas powers of x would lose the last digits of float32.
    """
    raise NotImplementedError

  def row_term(self, degrees: Array, parameters: Params) -> Array:
    """Returns log-features minus sum_l (n_l log(x_l/r) + r^2/2), ``[M]``."""
    raise NotImplementedError

  def split_shift(self, x: Array, parameters: Params) -> tuple[Array, Array]:
    """Returns the bases of the powers, and log-factors: ``[..., H]`` each."""
    return x, jnp.zeros_like(x)

  @override
  def constant(self, head_dim: int) -> Params:
    """Solves for the moments of unscaled normal data of unit variance."""
    deviation = head_dim**-0.25
    size = deviation * math.sqrt(2.0 / math.pi)
    zeros = ("query_mean", "key_mean", "square_mean", "mean_square", "cross")
    values = dict.fromkeys(zeros, 0.0) | {
      "query_square": deviation**2,
      "key_square": deviation**2,
      "square_product": deviation**4,
      "query_size": size,
      "key_size": size,
      "size_product": size**2,
      "least": -3.0 * deviation,
    }
    full = lambda value: jnp.full((head_dim,), value, jnp.float32)
    return self.solve(jax.tree.map(full, values))

  @override
  def moments_at(self, query: Array, key: Array) -> PyTree:
    """Returns squares only: means of |x| do not add up, means of x^2 do."""
    return {"query_square": jnp.square(query), "key_square": jnp.square(key)}

  @override
  def realise_rows(
    self, rows: WeightSample, num_features: int, state: ComponentState
  ) -> WeightSample:
    """Turns uniforms into degrees."""
    parameters = self.parameters(state, rows.w.shape[-1])
    degrees = self.degrees(stored_uniforms.to_uniform(rows.w), parameters)
    return rows._replace(w=jax.lax.stop_gradient(degrees))

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    parameters = self.parameters(state, x.shape[-1])
    bases, log_factor = self.split_shift(x, parameters)
    degrees, mean = rows.w, self.mean_degree(parameters)
    log_bases = log_size(bases) - 0.5 * jnp.log(mean)
    # At |x|^2 = 200 sums of size 1000 cancel, which costs a float32 feature its
    # fourth digit. So the terms of a typical degree are added up coordinate by
    # coordinate, where they are small, and only the difference of n from the
    # typical degree (exact, since both are integers) is projected.
    typical = jnp.round(mean)
    per_coordinate = typical * log_bases + (0.5 * mean + log_factor)
    exponent = _project_in_parts(log_bases, degrees - typical)
    exponent += self.row_term(degrees, parameters)[None, :]
    token_term = jnp.sum(per_coordinate, axis=-1, keepdims=True)
    token_term += self.gaussian_shift(x)
    negative = (bases < 0.0).astype(x.dtype)
    num_negative = base.project(negative, jnp.mod(degrees, 2.0))
    sign = 1.0 - 2.0 * jnp.mod(num_negative, 2.0)
    return LogFeatures(exponent + token_term, sign)

  def log_pair_moment(self, product: Array, parameters: Params) -> Array:
    """Returns log E Z^2 ``[...]`` from products x_l y_l ``[..., H]``."""
    raise NotImplementedError

  @override
  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    parameters = self.parameters(state, x.shape[-1])
    x, query_factor = self.split_shift(x, parameters)
    y, key_factor = self.split_shift(y, parameters)
    factor = 2.0 * jnp.sum(query_factor + key_factor, axis=-1)
    return factor + self.log_pair_moment(x * y, parameters)


def add_to_products(moments: PyTree, added: PyTree, name: str) -> PyTree:
  """Adds to the moments of both sides, and updates their product.

  Args:
    moments: with f"query_{name}", f"key_{name}" and f"{name}_product".
    added: increments of f"query_{name}" and f"key_{name}".
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
  """Calls `project` on few coordinates at a time, so that sums round less."""
  starts = range(0, x.shape[-1], SUMMED_AT_ONCE)
  parts = [slice(start, start + SUMMED_AT_ONCE) for start in starts]
  return functools.reduce(
    operator.add, (base.project(x[:, part], rows[:, part]) for part in parts)
  )


def log_size(x: Array) -> Array:
  """Returns log|x|, at least log(SMALLEST), where the gradient is zero."""
  size = jnp.abs(x)
  large = size > SMALLEST
  logarithm = jnp.log(jnp.where(large, size, 1.0))
  return jnp.where(large, logarithm, math.log(SMALLEST))


@base.COMPONENTS.register("poisrf")
@dataclasses.dataclass(frozen=True)
class PoisRF(Discrete):
  r"""Poisson random features (PoisRF).

  .. math::
    f(n, x) = e^{\lambda H / 2} \prod_l x_l^{n_l} \lambda^{-n_l / 2},
    \qquad n_l \sim \mathrm{Poisson}(\lambda)

  (softmax; the Gaussian kernel multiplies by :math:`e^{-|x|^2/2}`). Unbiased as
  far as the stored uniforms resolve the degrees: degrees less likely than 2^-24
  never occur, so the kernel of a coordinate lacks their terms :math:`(x_l
  y_l)^n / n!`. Their sum is below 1e-3 for rates of 0.1 to 8 and
  :math:`|x_l y_l| \le 1`, and 4 % at rate 0.01 and :math:`|x_l y_l| = 1`. One
  row has second moment :math:`\exp(\lambda H + \sum_l x_l^2 y_l^2 / \lambda)`.
  The mean of its log over all pairs is smallest at :math:`\lambda = (\frac1H
  \sum_l \mathrm{mean}_i x_{il}^2\, \mathrm{mean}_j y_{jl}^2)^{1/2}`, which is
  the rate of "batch" and "ema", within [0.01, 8].

  Features are signed; `ComponentInfo.positive` says what attention does then.
  Gradients contain n_l / x_l: finite, but huge where a coordinate is tiny (zero
  below 1e-30). Rows depend on the statistics: the stored uniforms are inverted
  through the Poisson cdf, in 80 M H comparisons per head.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of the rate: "batch", "ema", "learned" or "constant". The
      gradient of a learned rate treats the degrees as constants.

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, discretely induced
    features (2205.15317); the optimum over all pairs is not the paper's.

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

  info = base.ComponentInfo(
    name="poisrf",
    family="discrete",
    estimates="softmax or Gaussian kernel",
    formula="exp(lam H/2) prod_l x_l^n_l lam^(-n_l/2), n_l ~ Poisson(lam)",
    positive=False,
    variance="exp(lam H + sum_l x_l^2 y_l^2/lam) / K^2 - 1",
    cost="H logarithms, a second projection for the signs, M exponentials",
    good_for="kernel estimates at small norms",
    avoid="attention and training: signed, and its gradients explode near 0",
    source="2205.15317, discretely induced features",
    row_law="poisson",
  )

  @override
  def init_params(self, head_dim: int) -> Params:
    return {"log_rate": jnp.log(self.constant(head_dim)["rate"])}

  @override
  def from_params(self, params: Params) -> Params:
    return {"rate": jnp.clip(jnp.exp(params["log_rate"]), *RATE_RANGE)}

  @override
  def moments(
    self, query: Array, key: Array, query_mask: Mask, key_mask: Mask
  ) -> PyTree:
    query_square = base.masked_mean(jnp.square(query), query_mask)
    key_square = base.masked_mean(jnp.square(key), key_mask)
    return {
      "query_square": query_square,
      "key_square": key_square,
      "square_product": query_square * key_square,
    }

  @override
  def recentre(self, moments: PyTree, scatter: PyTree) -> PyTree:
    """Treats the centres as independent of the moments about them."""
    return add_to_products(moments, scatter, "square")

  @override
  def solve(self, moments: PyTree) -> PyTree:
    mean = jnp.mean(moments["square_product"])
    return {"rate": jnp.clip(jnp.sqrt(mean), *RATE_RANGE)}

  @override
  def degrees(self, uniform: Array, parameters: Params) -> Array:
    return poisson_degrees(uniform, parameters["rate"])

  @override
  def mean_degree(self, parameters: Params) -> Array:
    return parameters["rate"]

  @override
  def row_term(self, degrees: Array, parameters: Params) -> Array:
    """Returns zeros, because r^2 is the rate."""
    return jnp.zeros(degrees.shape[:1], degrees.dtype)

  @override
  def log_pair_moment(self, product: Array, parameters: Params) -> Array:
    rate, head_dim = parameters["rate"], product.shape[-1]
    return rate * head_dim + jnp.sum(jnp.square(product), axis=-1) / rate


@base.COMPONENTS.register("geomrf")
@dataclasses.dataclass(frozen=True)
class GeomRF(Discrete):
  r"""Geometric random features (GeomRF).

  .. math::
    f(n, x) = p^{-H/2} \prod_l x_l^{n_l} (1-p)^{-n_l/2} (n_l!)^{-1/2},
    \qquad P(n_l = n) = p (1 - p)^n

  (softmax; the Gaussian kernel multiplies by :math:`e^{-|x|^2/2}`). Unbiased as
  far as the stored uniforms resolve the degrees, see :class:`PoisRF`: the error
  is below 1e-3 for p of 0.2 to 0.9 and :math:`|x_l y_l| \le 1`, 2 % at p = 0.99
  and :math:`|x_l y_l| = 1`, 5 % at p = 0.9 and :math:`|x_l y_l| = 4`. One row
  has second moment :math:`p^{-H} \prod_l I_0(2 |x_l y_l| / \sqrt{1-p})`.
  "batch" and "ema" use the p that minimises the log of it at :math:`|x_l y_l| =
  \mathrm{mean}_i |x_{il}|\, \mathrm{mean}_j |y_{jl}|`, found on a grid over
  [0.001, 0.99]: exact for one pair, an approximation for several (the exact
  mean would cost T S H).

  Features are signed; `ComponentInfo.positive` says what attention does then.
  Gradients contain n_l / x_l: finite, but huge where a coordinate is tiny (zero
  below 1e-30).

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of p: "batch", "ema", "learned" or "constant". The
      gradient of a learned p treats the degrees as constants.

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

  info = base.ComponentInfo(
    name="geomrf",
    family="discrete",
    estimates="softmax or Gaussian kernel",
    formula=(
      "p^(-H/2) prod_l x_l^n_l (1-p)^(-n_l/2) n_l!^(-1/2), "
      "P(n_l = n) = p (1-p)^n"
    ),
    positive=False,
    variance="p^-H prod_l I_0(2|x_l y_l|/sqrt(1-p)) / K^2 - 1",
    cost="H logarithms, a second projection for the signs, M exponentials",
    good_for="kernel estimates at unit variance: less variance than posrf and "
    "poisrf there, not at small norms",
    avoid="attention and training: signed, and its gradients explode near 0",
    source="2205.15317, discretely induced features",
    row_law="geometric",
  )

  @override
  def init_params(self, head_dim: int) -> Params:
    return {"p_logit": logit(self.constant(head_dim)["p"])}

  @override
  def from_params(self, params: Params) -> Params:
    return {"p": jnp.clip(jax.nn.sigmoid(params["p_logit"]), *P_RANGE)}

  @override
  def moments(
    self, query: Array, key: Array, query_mask: Mask, key_mask: Mask
  ) -> PyTree:
    query_size = base.masked_mean(jnp.abs(query), query_mask)
    key_size = base.masked_mean(jnp.abs(key), key_mask)
    return {
      "query_size": query_size,
      "key_size": key_size,
      "size_product": query_size * key_size,
    }

  @override
  def recentre(self, moments: PyTree, scatter: PyTree) -> PyTree:
    """Converts squares to sizes as for normal data: (E|x|)^2 = 2/pi E x^2."""
    grown = {}
    for side in ("query", "key"):
      size, square = moments[f"{side}_size"], scatter[f"{side}_square"]
      square = jnp.square(size) + 2.0 / math.pi * jnp.maximum(square, 0.0)
      grown[f"{side}_size"] = jnp.sqrt(square) - size
    return add_to_products(moments, grown, "size")

  @override
  def solve(self, moments: PyTree) -> PyTree:
    return {"p": optimal_p(moments["size_product"])}

  @override
  def degrees(self, uniform: Array, parameters: Params) -> Array:
    return geometric_degrees(uniform, parameters["p"])

  @override
  def mean_degree(self, parameters: Params) -> Array:
    return (1.0 - parameters["p"]) / parameters["p"]

  @override
  def row_term(self, degrees: Array, parameters: Params) -> Array:
    """Returns -1/2 of the sum of log(n! p^(n+1)) + r^2."""
    p, mean = parameters["p"], self.mean_degree(parameters)
    # The gradient of log 0 would be NaN.
    log_ratio = jnp.log(jnp.maximum(degrees, 1.0) / mean)
    terms = degrees * log_ratio - (degrees - mean)
    terms += stirling_rest(degrees) + degrees * jnp.log1p(-p) + jnp.log(p)
    return -0.5 * jnp.sum(terms, axis=-1)

  @override
  def log_pair_moment(self, product: Array, parameters: Params) -> Array:
    p, head_dim = parameters["p"], product.shape[-1]
    argument = 2.0 * jnp.abs(product) / jnp.sqrt(1.0 - p)
    log_bessel = jnp.log(i0e(argument)) + argument
    return jnp.sum(log_bessel, axis=-1) - head_dim * jnp.log(p)
