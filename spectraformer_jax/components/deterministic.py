"""Maps without a weight matrix, whose features give their kernel exactly."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.components import base
from spectraformer_jax.components.arc_cosine import check_epsilon
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Side,
  WeightSample,
)


@base.COMPONENTS.register("elu1")
@dataclasses.dataclass(frozen=True)
class ELU1(base.Component):
  r"""ELU+1: the first linear attention.

  .. math::
    \phi(x)_l = \mathrm{elu}(q_l) + 1 = \begin{cases} q_l + 1 & q_l > 0 \\
      e^{q_l} & q_l \le 0 \end{cases}, \qquad q = H^{1/4} x

  on the unscaled vector q, as in the paper: the factor :math:`H^{1/4}` undoes
  the default scale of attention, so any other scale is relative to the default.
  Deterministic and strictly positive, without W: weight matrix "none",
  num_features=None. It does not estimate softmax.

  References:
    Katharopoulos et al., Transformers are RNNs, 2020, equation 7 (2006.16236).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("elu1", "none", num_features=None)
    >>> v = fm.init(jax.random.key(0), head_dim=16)
    >>> x = jnp.array([0.5, -0.5] * 8)[None, None]
    >>> [round(float(f), 3) for f in fm.apply(v, x, side="key")[0, 0, :2]]
    [2.0, 0.368]
  """

  info = base.ComponentInfo(
    name="elu1",
    family="own kernel",
    estimates="(elu(q) + 1) . (elu(k) + 1), exactly",
    formula="elu(x_l H^(1/4)) + 1",
    positive=True,
    features="H",
    variance="0",
    cost="H exponentials",
    good_for="a cheap trained baseline",
    avoid="estimates of the softmax kernel; small head_dim: it is all of F",
    source="2006.16236, equation 7",
    row_law="none",
  )

  @override
  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    return head_dim

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    return LogFeatures(_log_elu1(x))

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    return jnp.sum(jnp.exp(_log_elu1(x) + _log_elu1(y)), axis=-1)


def _log_elu1(x: Array) -> Array:
  """Returns log(elu(q) + 1) at q = H^(1/4) x, which is never -inf."""
  q = x.shape[-1] ** 0.25 * x
  return jnp.where(q > 0.0, jnp.log1p(jnp.maximum(q, 0.0)), q)


@base.COMPONENTS.register("cosformer")
@dataclasses.dataclass(frozen=True)
class CosFormer(base.Component):
  r"""cosFormer: positive parts, weighted by the cosine of a distance.

  .. math::
    \phi(x, i) = [r \cos\tfrac{\pi i}{2 L}, r \sin\tfrac{\pi i}{2 L}],
    \quad r = \mathrm{relu}(x) + \epsilon, \qquad
    \phi(x, i) \cdot \phi(y, j) = r_x \cdot r_y
      \cos\tfrac{\pi (i - j)}{2 L}

  with a fixed L = `max_length` (if L were the length of the batch, padding
  would change the output). All features are non-negative. Without W: weight
  matrix "none", num_features=None. It does not estimate softmax.

  Positions of queries and of keys start at 0, whatever T and S are: use the
  map where both run along one axis, as in self-attention. A caller that maps a
  sequence piece by piece passes the `position` of each piece. Beyond L the
  cosines would be negative, so a longer sequence is an error; the tokens of an
  initial state count, too. If the position is known only at run time (as in a
  jitted `decode_step`), outputs from position L on are NaN. `kernel_value`
  assumes equal positions.

  Args:
    max_length: L, at least the length of the longest sequence.
    epsilon: added to relu(x). With 0, the output is zeros for a query whose
      features have no positive product with those of any key.

  Raises:
    ValueError: a max_length that is not a positive integer, a negative epsilon;
      from the map, a sequence longer than max_length, earlier tokens included.

  References:
    Qin et al., cosFormer, 2022, cos-based re-weighting (2202.08791).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("cosformer", "none", num_features=None,
    ...                     component_kwargs={"max_length": 4})
    >>> v = fm.init(jax.random.key(0), head_dim=2)
    >>> phi = fm.apply(v, jnp.ones((3, 1, 2)), side="key")[:, 0]
    >>> [round(float(k), 3) for k in (phi @ phi[0]) / 2]
    [1.0, 0.924, 0.707]
  """

  max_length: int = 4096
  epsilon: float = 0.0

  info = base.ComponentInfo(
    name="cosformer",
    family="own kernel",
    estimates="relu(x) . relu(y) cos(pi (i - j) / 2L), exactly",
    formula="[relu(x) cos(pi i/2L), relu(x) sin(pi i/2L)]",
    positive=True,
    features="2H",
    variance="0",
    cost="2H products",
    good_for="trained attention that favours near positions",
    avoid="sets, cross-attention of unrelated axes, unbounded length",
    source="2202.08791, cos-based re-weighting",
    row_law="none",
    positional=True,
  )

  def __post_init__(self) -> None:
    check_positive_int("max_length", self.max_length)
    check_epsilon(self.epsilon)

  @override
  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    return None if head_dim is None else 2 * head_dim

  @property
  @override
  def longest(self) -> int | None:
    return self.max_length

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    start = 0 if state.position is None else state.position
    position = start + jnp.arange(x.shape[0])
    angles = position.astype(x.dtype) * (0.5 * math.pi / self.max_length)
    r = jax.nn.relu(x) + self.epsilon
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    both = jnp.concatenate([r * cosine, r * sine], axis=-1)
    return base.to_log_features(both)

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    phi, psi = (jax.nn.relu(z) + self.epsilon for z in (x, y))
    return jnp.sum(phi * psi, axis=-1)


@base.COMPONENTS.register("taylor2")
@dataclasses.dataclass(frozen=True)
class Taylor2(base.Component):
  r"""Second-order Taylor polynomial of the softmax kernel, exactly.

  .. math::
    \phi(x) = [1, x, \mathrm{vec}(x x^\top) / \sqrt 2], \qquad
    \phi(x) \cdot \phi(y) = 1 + x \cdot y + (x \cdot y)^2 / 2 \ge 1/2

  Deterministic, without W: weight matrix "none", num_features=None. Close to
  the softmax kernel for |x.y| well below 1. For large |x.y| the kernel grows
  like a square in both directions: a key opposite to the query counts as much
  as an aligned one.

  Features are signed but the kernel is positive, so normalizers are never near
  zero: attention's guard for signed maps doubles the cost of the sums but adds
  no bias.

  References:
    Arora et al., Simple linear attention language models balance the
    recall-throughput tradeoff, 2024, the Taylor feature map (2402.18668).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("taylor2", "none", num_features=None)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> phi = fm.apply(v, jnp.ones((1, 1, 4)) / 2, side="key")[0, 0]
    >>> phi.shape, round(float(phi @ phi), 6)
    ((21,), 2.5)
  """

  info = base.ComponentInfo(
    name="taylor2",
    family="own kernel",
    estimates="1 + x.y + (x.y)^2/2, exactly",
    formula="[1, x, vec(x x^T)/sqrt 2]",
    positive=False,
    features="1 + H + H^2",
    variance="0",
    cost="H^2 products",
    good_for="small head_dim, where F = 1 + H + H^2 is affordable",
    avoid="large scores: it grows in both directions",
    source="2402.18668, Taylor feature map",
    row_law="none",
  )

  @override
  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    return None if head_dim is None else 1 + head_dim + head_dim**2

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    squares = x[:, :, None] * x[:, None, :] * math.sqrt(0.5)
    ones = jnp.ones((x.shape[0], 1), x.dtype)
    flat = jnp.reshape(squares, (x.shape[0], -1))
    return base.to_log_features(jnp.concatenate([ones, x, flat], axis=-1))

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    score = jnp.sum(x * y, axis=-1)
    return 1.0 + score + 0.5 * score**2


@base.COMPONENTS.register("dpfp")
@dataclasses.dataclass(frozen=True)
class DPFP(base.Component):
  r"""DPFP: products of a vector's positive and negative parts.

  .. math::
    r = [\mathrm{relu}(q), \mathrm{relu}(-q)], \qquad
    \phi(x)_{(j-1) 2H + l} = r_l\, r_{l+j}, \quad j = 1, \dots, \nu

  on the unscaled vector :math:`q = H^{1/4} x`, with indices modulo 2H. The
  paper multiplies by :math:`r_{l-j}`, which gives the same features in another
  order. Deterministic, without W: weight matrix "none", num_features=None. It
  does not estimate softmax.

  The output is zeros for a query whose features have no positive product with
  those of any key.

  Args:
    nu: number of products of each part, from 1 to 2H - 1.

  Raises:
    ValueError: a nu that is not a positive integer; from the map, a nu above
      2H - 1.

  References:
    Schlag et al., Linear Transformers Are Secretly Fast Weight Programmers,
    2021, section 5.3 (2102.11174).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("dpfp", "none", num_features=None,
    ...                     component_kwargs={"nu": 2})
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jnp.array([[[1.0, 2.0, 3.0, -1.0]]]) / 4**0.25
    >>> [round(float(f)) for f in fm.apply(v, x, side="key")[0, 0]]
    [2, 6, 0, 0, 0, 0, 0, 1, 3, 0, 0, 0, 0, 0, 0, 2]
  """

  nu: int = 1

  info = base.ComponentInfo(
    name="dpfp",
    family="own kernel",
    estimates="sum of r_l r_(l+j) s_l s_(l+j), exactly",
    formula="r_l r_(l+j), r = [relu(q), relu(-q)], q = x H^(1/4)",
    positive=True,
    features="2H nu",
    variance="0",
    cost="2H nu products",
    good_for="more features than head_dim, without parameters or exponentials",
    avoid="estimates of the softmax kernel",
    source="2102.11174, section 5.3",
    row_law="none",
  )

  def __post_init__(self) -> None:
    check_positive_int("nu", self.nu)

  @override
  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    return None if head_dim is None else 2 * head_dim * self.nu

  @override
  def check(self, num_features: int, head_dim: int) -> None:
    if self.nu >= 2 * head_dim:
      raise ValueError(
        f"nu must be below 2 head_dim = {2 * head_dim}, got {self.nu}."
      )

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    return base.to_log_features(self._products(x))

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    return jnp.sum(self._products(x) * self._products(y), axis=-1)

  def _products(self, x: Array) -> Array:
    """Returns the features, ``[..., H] -> [..., 2H nu]``."""
    q = x.shape[-1] ** 0.25 * x
    parts = jnp.concatenate([jax.nn.relu(q), jax.nn.relu(-q)], axis=-1)
    products = [
      parts * jnp.roll(parts, -shift, axis=-1)
      for shift in range(1, self.nu + 1)
    ]
    return jnp.concatenate(products, axis=-1)
