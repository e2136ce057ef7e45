"""Arc-cosine kernels: powers of the positive part of W x."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Side,
  WeightSample,
)

ORDERS = (0, 1, 2)

# The integrand is smooth and positive, so the quadrature is exact in float32 up
# to order 4.
QUADRATURE_NODES = 16
ROWS = ("gaussian", "none")


def log_arc_cosine(x: Array, y: Array, order: int) -> Array:
  r"""Returns log E relu(w.x)^n relu(w.y)^n over w ~ N(0, I), n = `order`.

  .. math::
    \frac{n!}{4\pi} |x|^n |y|^n \int_{t-\pi}^{\pi-t}
      (\cos t + \cos\varphi)^n \, d\varphi

  with t the angle between x and y (relu to the power 0 is a step). The
  quadrature uses :math:`\cos t + \cos\varphi = 2 \sin\frac{r + \varphi}{2}
  \sin\frac{r - \varphi}{2}` with r = pi - t: all terms are positive, so nothing
  cancels near opposite vectors, where the mean falls like :math:`r^{2n+1}`.

  Args:
    x: ``[..., H]``.
    y: ``[..., H]``, broadcast against x.
    order: n, from 0 to 4.

  Returns:
    ``[...]``; -inf where the mean is 0.
  """
  rest = base.angle(x, -y)  # r = pi - t
  squares = jnp.sum(x**2, axis=-1) * jnp.sum(y**2, axis=-1)
  is_zero = (squares == 0.0) | (rest == 0.0)
  rest = jnp.where(is_zero, 1.0, rest)
  nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
  half = jnp.sin(0.5 * rest)
  # Over half of the interval, since the integrand is even; divided by its
  # largest value.
  integral = 0.0
  for node, weight in zip(0.5 * (nodes + 1.0), 0.5 * weights, strict=True):
    above = jnp.sin((0.5 * (1.0 + float(node))) * rest) / half
    below = jnp.sin((0.5 * (1.0 - float(node))) * rest) / half
    integral += float(weight) * (above * below) ** order
  log_mean = (
    math.log(math.factorial(order) / (2.0 * math.pi))
    + 0.5 * order * jnp.log(jnp.where(is_zero, 1.0, squares))
    + order * (math.log(2.0) + 2.0 * jnp.log(half))
    + jnp.log(rest)
    + jnp.log(integral)
  )
  return jnp.where(is_zero, -jnp.inf, log_mean)


@base.COMPONENTS.register("arccos")
@dataclasses.dataclass(frozen=True)
class ArcCosine(base.Component):
  r"""Arc-cosine features of order 0, 1 or 2.

  .. math::
    f(\omega, x) = \mathrm{relu}(\omega^\top x)^n, \qquad
    K_1 = \frac{|x| |y|}{2\pi} (\sin t + (\pi - t) \cos t)

  with t the angle between x and y. Order 0 is a step,
  :math:`K_0 = (\pi - t)/2\pi`; order 2 gives :math:`K_2 = \frac{|x|^2 |y|^2}
  {2\pi} (3 \sin t \cos t + (\pi - t)(1 + 2 \cos^2 t))`. The second moment of
  one row is the kernel of twice the order. It does not estimate softmax: the
  kernel is flat, so its variance is low, but no order separates long keys from
  short ones as the softmax does (order 0 depends on directions only, and no
  gradient passes its step).

  Features can all be zero. The output is zeros for x = 0, and for a query whose
  features have no positive product with those of any key.

  Args:
    order: n: 0, 1 or 2.

  Raises:
    ValueError: any other order.

  References:
    Cho and Saul, Kernel Methods for Deep Learning, 2009, section 2.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("arccos", "orf", num_features=16,
    ...                     component_kwargs={"order": 2})
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jnp.eye(4)[0]
    >>> round(float(fm.kernel(v, x, x)), 6)
    1.5
  """

  order: int = 1

  def __post_init__(self) -> None:
    check_choice("order", self.order, ORDERS)

  def _info(self) -> base.ComponentInfo:
    """Returns the facts; the formula depends on the order."""
    return base.ComponentInfo(
      name="arccos",
      family="own kernel",
      estimates=f"arc-cosine kernel of order {self.order}",
      formula=("[w.x > 0]", "relu(w.x)", "relu(w.x)^2")[self.order],
      positive=True,
      variance=f"K_{2 * self.order} / K_{self.order}^2 - 1",
      cost="M comparisons and products",
      good_for="attention without exponentials, at low variance",
      avoid="estimates of the softmax kernel"
      + ("" if self.order else "; training, as no gradient passes the step"),
      source="Cho and Saul 2009, section 2",
    )

  info = base.info_from_options(_info)

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    projected = base.project(x, rows.w)
    if self.order == 0:
      return base.to_log_features((projected > 0.0).astype(x.dtype))
    return base.to_log_features(jax.nn.relu(projected) ** self.order)

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    return jnp.exp(log_arc_cosine(x, y, self.order))

  @override
  def log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    return log_arc_cosine(x, y, 2 * self.order)


@base.COMPONENTS.register("relu")
@dataclasses.dataclass(frozen=True)
class ReLU(base.Component):
  r"""ReLU features (Performer-ReLU), with W or without.

  .. math::
    f(\omega, x) = \mathrm{relu}(\omega^\top x) + \epsilon,
    \qquad K = K_1(x, y) + \epsilon \frac{|x| + |y|}{\sqrt{2\pi}} + \epsilon^2

  with :math:`K_1` the arc-cosine kernel of order 1 (:class:`ArcCosine`).
  Without W each coordinate is a feature: :math:`K = \sum_l
  (\mathrm{relu}(x_l) + \epsilon)(\mathrm{relu}(y_l) + \epsilon)`, with weight
  matrix "none" and num_features=None. It does not estimate softmax.

  :math:`\epsilon` keeps normalizers positive where all products of features are
  zero: it mixes in a nearly uniform attention. With epsilon = 0, the output is
  zeros for a query whose features have no positive product with those of any
  key.

  Args:
    rows: "gaussian", or "none" to map x itself, without W.
    epsilon: added to every feature.

  Raises:
    ValueError: unknown `rows`, or a negative epsilon.

  References:
    Choromanski et al., Rethinking Attention with Performers, 2021, section 4
    and appendix (2009.14794); kernel: Cho and Saul 2009, section 2.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("relu", "none", num_features=None,
    ...                     component_kwargs={"rows": "none"})
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 4)
  """

  rows: str = "gaussian"
  epsilon: float = 1e-3

  def __post_init__(self) -> None:
    check_choice("rows", self.rows, ROWS)
    check_epsilon(self.epsilon)

  def _info(self) -> base.ComponentInfo:
    """Returns the facts; all but the name depend on `rows`."""
    has_rows = self.rows != "none"
    return base.ComponentInfo(
      name="relu",
      family="own kernel",
      estimates=(
        "arc-cosine kernel of order 1" if has_rows else "relu(x) . relu(y)"
      ),
      formula="relu(w.x) + epsilon" if has_rows else "relu(x) + epsilon",
      positive=True,
      features="M" if has_rows else "H",
      variance="K_2 / K_1^2 - 1 (epsilon = 0)" if has_rows else "0",
      cost="F comparisons",
      good_for="trained attention without exponentials, at low variance",
      avoid="estimates of the softmax kernel",
      source="2009.14794, section 4; Cho and Saul 2009, section 2",
      row_law=self.rows,
    )

  info = base.info_from_options(_info)

  @override
  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    return head_dim if self.rows == "none" else num_features

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    projected = x if self.rows == "none" else base.project(x, rows.w)
    return base.to_log_features(jax.nn.relu(projected) + self.epsilon)

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    if self.rows == "none":
      phi, psi = (jax.nn.relu(z) + self.epsilon for z in (x, y))
      return jnp.sum(phi * psi, axis=-1)
    means = (base.norm(x) + base.norm(y))[..., 0] / math.sqrt(2.0 * math.pi)
    mean = jnp.exp(log_arc_cosine(x, y, 1))
    return mean + self.epsilon * means + self.epsilon**2

  @override
  def log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    if self.rows == "none":
      return 2.0 * jnp.log(self.kernel_value(x, y, state))
    # E[(a + e)^2 (b + e)^2] with a = relu(w.x), b = relu(w.y), by powers of e.
    a, b = base.norm(x)[..., 0], base.norm(y)[..., 0]
    root = math.sqrt(2.0 * math.pi)
    # (1 + cos t)^2, written without cancellation near opposite vectors.
    opening = jnp.square(2.0 * jnp.square(jnp.sin(0.5 * base.angle(x, -y))))
    powers = (
      jnp.exp(log_arc_cosine(x, y, 2)),
      a * b * (a + b) * opening / root,
      0.5 * (a**2 + b**2) + 4.0 * jnp.exp(log_arc_cosine(x, y, 1)),
      2.0 * (a + b) / root,
      1.0,
    )
    return jnp.log(sum(self.epsilon**n * term for n, term in enumerate(powers)))


def check_epsilon(epsilon: float) -> None:
  """Raises ValueError for a negative `epsilon`."""
  if not epsilon >= 0:
    raise ValueError(f"epsilon must not be negative, got {epsilon!r}.")
