"""Random Maclaurin features: any power series of x.y with positive terms."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.registry import check_choice, check_int
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Projection,
  Side,
  WeightSample,
)

COEFFICIENTS = ("exp", "inverse", "log")
DEGREES = ("geometric", "poisson")

# Products of more rows may exceed the range of float32.
LARGEST_DEGREE = 24

# Radius of the ball into which "inverse" and "log" map their inputs.
RADIUS = 0.85


@functools.lru_cache(maxsize=64)
def log_coefficients(name: str, max_degree: int) -> np.ndarray:
  """Returns log a_n for n = 0, ..., max_degree, float64."""
  n = np.arange(max_degree + 1)
  if name == "exp":
    return -np.array([math.lgamma(k + 1.0) for k in n])
  if name == "log":
    return -np.log(np.maximum(n, 1))
  return np.zeros(max_degree + 1)


@functools.lru_cache(maxsize=64)
def log_degree_law(rate: float | None, max_degree: int) -> np.ndarray:
  """Returns log p_n for n = 0, ..., max_degree, renormalised, float64.

  Args:
    rate: rate of the Poisson law; None for the geometric law, 2^-(n+1).
    max_degree: the largest degree; larger ones have probability zero.
  """
  n = np.arange(max_degree + 1)
  if rate is None:
    log_p = -(n + 1) * math.log(2.0)
  else:
    log_p = n * math.log(rate) - np.array([math.lgamma(k + 1.0) for k in n])
  return log_p - np.log(np.sum(np.exp(log_p - log_p.max()))) - log_p.max()


@base.COMPONENTS.register("maclaurin")
@dataclasses.dataclass(frozen=True)
class Maclaurin(base.Component):
  r"""Random Maclaurin features (Macformer).

  .. math::
    f(r, x) = \sqrt{a_N / p_N} \prod_{j=1}^N r_j \cdot x,
    \qquad K = \sum_{n=0}^{n_{max}} a_n (x \cdot y)^n

  with Rademacher rows :math:`r_j` and a random degree N, drawn with the rows.
  Coefficients: "exp", :math:`1/n!`, the softmax kernel; "inverse", 1, for
  :math:`1/(1-t)`; "log", :math:`a_0 = 1,\; a_n = 1/n`, for
  :math:`1 - \log(1-t)`.

  The series stops at `max_degree`. `kernel_value` is the sum up to there, which
  the features estimate without bias. Against the full kernel the bias is
  :math:`-\sum_{n > n_{max}} a_n (x \cdot y)^n`: for "exp" and max_degree 8,
  1.75e-3 at x.y = 2 and 15 % of the kernel at x.y = 6.

  "inverse" and "log" need |x.y| < 1, so inputs are first mapped into the ball
  of radius R by :math:`x \mapsto x / \sqrt{1 + |x|^2/R^2}`, which hardly
  changes short vectors.

  One row has second moment :math:`\sum_n (a_n^2 / p_n)\, v^n`, :math:`v = |x|^2
  |y|^2 + 2 (x \cdot y)^2 - 2 \sum_l x_l^2 y_l^2`. For "exp" it is smallest for
  Poisson degrees of rate :math:`\sqrt v`: :math:`e^{2 \sqrt v}`, far below that
  of the classic :math:`p_n = 2^{-(n+1)}` at norms above 1.

  Features are signed; `ComponentInfo.positive` says what attention does then.

  Args:
    coefficients: "exp", "inverse" or "log".
    degrees: law of N: "geometric", 2^-(n+1), or "poisson"; truncated at
      max_degree and renormalised.
    max_degree: the largest N, at most 24. W has ``M * max_degree`` rows.
    rate: rate of the Poisson law; None for sqrt(H), which suits unit-variance
      queries and keys.
    radius: R in (0, 1). None: 0.85 for "inverse" and "log"; "exp" then takes
      its inputs unchanged.

  Raises:
    ValueError: unknown coefficients or degrees, a max_degree outside 1..24, a
      rate that is not positive or for geometric degrees, a radius outside
      (0, 1).

  References:
    Kar and Karnick, Random Feature Maps for Dot Product Kernels, 2012,
    Algorithm 1; Macformer, 2024 (2408.11656); neither has the Poisson law.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("maclaurin", "iid", num_features=16,
    ...                     component_kwargs={"degrees": "poisson"})
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 16)
    >>> x = jnp.ones(4) / 2
    >>> round(float(fm.kernel(v, x, x)), 4)
    2.7183
  """

  coefficients: str = "exp"
  degrees: str = "geometric"
  max_degree: int = 8
  rate: float | None = None
  radius: float | None = None

  def __post_init__(self) -> None:
    check_choice("coefficients", self.coefficients, COEFFICIENTS)
    check_choice("degrees", self.degrees, DEGREES)
    check_int("max_degree", self.max_degree, 1, LARGEST_DEGREE)
    if self.rate is not None and self.degrees != "poisson":
      raise ValueError(
        f"rate={self.rate!r} is for degrees='poisson' only, got degrees="
        f"{self.degrees!r}: leave rate out, or set degrees='poisson'."
      )
    if self.rate is not None and not self.rate > 0:
      raise ValueError(f"rate must be positive, got {self.rate!r}.")
    if self.radius is not None and not 0 < self.radius < 1:
      raise ValueError(f"radius must be in (0, 1), got {self.radius!r}.")

  def _info(self) -> base.ComponentInfo:
    """Returns the facts; the kernel depends on the coefficients."""
    series = {
      "exp": "exp(x.y)",
      "inverse": "1/(1 - x.y)",
      "log": "1 - log(1 - x.y)",
    }[self.coefficients]
    return base.ComponentInfo(
      name="maclaurin",
      family="own kernel",
      estimates=f"{series}, up to degree {self.max_degree}",
      formula="sqrt(a_N/p_N) prod_{j <= N} r_j.x",
      positive=False,
      variance="sum_n a_n^2/p_n v^n / K^2 - 1",
      cost=f"{self.max_degree} projections",
      good_for="other power series of x.y than the exponential",
      avoid="norms above 1 with geometric degrees; scarce rows",
      source="Kar and Karnick 2012, Algorithm 1; 2408.11656",
      row_law="rademacher",
    )

  info = base.info_from_options(_info)

  @override
  def num_rows(self, num_features: int) -> int:
    return num_features * self.max_degree

  @property
  @override
  def row_draws(self) -> int:
    """One draw per factor, since the factors of a product are independent."""
    return self.max_degree

  @override
  def draw(self, rng: Array, num_features: int, head_dim: int) -> Projection:
    """Draws the degrees N: small integers, exact in any float dtype."""
    log_p = jnp.asarray(self._log_p(head_dim), jnp.float32)
    degree = jax.random.categorical(rng, log_p, shape=(num_features,))
    return {"degree": degree.astype(jnp.float32)}

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    x, degree = self._inside(x), state.random["degree"].astype(jnp.int32)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    size = jax.lax.stop_gradient(jnp.where(norm > 0.0, norm, 1.0))
    factors = jnp.reshape(
      base.project(x / size, rows.w), (x.shape[0], self.max_degree, -1)
    )
    index = np.arange(self.max_degree, dtype=np.int32)[:, None]
    is_factor = (degree[None, :] > index)[None, :, :]
    product = jnp.prod(jnp.where(is_factor, factors, 1.0), axis=1)
    # A product of many factors can be large, so its size goes to log_magnitude.
    bound = jax.lax.stop_gradient(jnp.maximum(jnp.abs(product), 1.0))
    log_size = degree.astype(x.dtype)[None, :] * jnp.log(size) + jnp.log(bound)
    weight = 0.5 * (self._log_a() - self._log_p(x.shape[-1]))
    weight = jnp.asarray(weight, x.dtype)[degree]
    return LogFeatures(log_size + weight[None, :], product / bound)

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    score = jnp.sum(self._inside(x) * self._inside(y), axis=-1)
    coefficients = np.exp(self._log_a()[::-1])
    return jnp.polyval(jnp.asarray(coefficients, score.dtype), score)

  @override
  def log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    x, y = self._inside(x), self._inside(y)
    total = lambda z: jnp.sum(z, axis=-1)
    cross = total(x * y) ** 2 - total((x * y) ** 2)
    v = total(x**2) * total(y**2) + 2.0 * cross
    log_v = jnp.log(jnp.maximum(v, 1e-30))[..., None]
    n = np.arange(self.max_degree + 1, dtype=np.float32)
    weight = 2.0 * self._log_a() - self._log_p(x.shape[-1])
    terms = log_v * jnp.reshape(n, (1,) * v.ndim + (-1,))
    weight = jnp.reshape(jnp.asarray(weight, x.dtype), (1,) * v.ndim + (-1,))
    return jax.nn.logsumexp(terms + weight, axis=-1)

  def _log_a(self) -> np.ndarray:
    """Returns log a_n, ``[max_degree + 1]``."""
    return log_coefficients(self.coefficients, self.max_degree)

  def _log_p(self, head_dim: int) -> np.ndarray:
    """Returns log p_n, ``[max_degree + 1]``."""
    if self.degrees == "geometric":
      return log_degree_law(None, self.max_degree)
    rate = math.sqrt(head_dim) if self.rate is None else float(self.rate)
    return log_degree_law(rate, self.max_degree)

  def _inside(self, x: Array) -> Array:
    """Maps x into the ball of radius R, if there is one."""
    radius = self.radius
    if radius is None:
      if self.coefficients == "exp":
        return x
      radius = RADIUS
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(1.0 + square / radius**2)
