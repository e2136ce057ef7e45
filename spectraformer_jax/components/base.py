"""The interface of component functions: the f in phi(x) = f(W x, x)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.kernels import KERNELS
from spectraformer_jax.registry import Registry, check_choice
from spectraformer_jax.registry import info_from_options as info_from_options
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Mask,
  Params,
  Projection,
  PyTree,
  Side,
  WeightSample,
)

COMPONENTS = Registry("component")


@dataclasses.dataclass(frozen=True)
class ComponentInfo:
  """Static facts about a component, from which tables and tests are made.

  Attributes:
    name: registry name.
    family: place in the taxonomy: "trigonometric", "exponential", "dense
      exponential", "discrete", "hybrid", "own kernel" or "learnt".
    estimates: the kernel it estimates, in words or a formula.
    formula: the feature of one row.
    positive: features are never negative. The normalizer of attention with
      signed features can be near zero or negative; attention keeps it away from
      zero, which biases the output there and doubles the cost of the sums.
    features: feature dim as text: "M", "2M", ...
    variance: relative variance of one row, or "" where not known.
    cost: operations per token, without the product W x.
    good_for: when to use it.
    avoid: when not to use it.
    source: paper and equation.
    row_law: name of the law of the rows it needs; "none" if it has no rows.
    causal_safe: features of a token do not depend on other tokens.
    positional: features also depend on the token's position.
    even: rows w and -w give the same estimate, so a matrix that holds rows and
      their negatives repeats each estimate.
    learnable: its parameters are its kernel, so no fixed kernel exists.
  """

  name: str
  family: str
  estimates: str
  formula: str
  positive: bool
  source: str
  features: str = "M"
  variance: str = ""
  cost: str = "F exponentials"
  good_for: str = ""
  avoid: str = ""
  row_law: str = "gaussian"
  causal_safe: bool = True
  positional: bool = False
  even: bool = False
  learnable: bool = False

  @property
  def takes_num_features(self) -> bool:
    """Whether the number of features is a multiple of M."""
    return "M" in self.features


@dataclasses.dataclass(frozen=True)
class Component:
  """Base of all component functions f.

  A subclass is a frozen dataclass whose fields are its options, with a class
  attribute `info`, a `log_features` and a `kernel_value`. All methods are pure,
  work in float32 and see one head of one example: `vmap` adds heads and batch.
  The row axis is innermost in the layout of features: feature f comes from row
  f mod M. If W has rows, the caller multiplies features by ``1/sqrt(M)``, row
  weights and signs.

  Attributes:
    info: facts about the component. If they depend on its options, make `info`
      by `info_from_options`.
    features_per_row: F / M. A component whose F is no multiple of M overrides
      `feature_dim` instead.
    starts_from_data: whether `start` depends on its arguments.
  """

  info: ClassVar[ComponentInfo]
  features_per_row: ClassVar[int] = 1
  starts_from_data: ClassVar[bool] = False

  @property
  def needs_stats(self) -> bool:
    """Whether `log_features` needs data-dependent stats."""
    return False

  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    """Returns F; None if it depends on an unknown head_dim.

    Args:
      num_features: M, here and in all methods; 0 for a component that takes
        none.
      head_dim: H, or None if unknown.
    """
    return self.features_per_row * num_features

  def num_rows(self, num_features: int) -> int:
    """Returns the number of rows of W for `num_features` features."""
    return num_features

  @property
  def row_draws(self) -> int:
    """Number of independent draws of W, of equal size, that make up the rows.

    A component that multiplies rows needs more than one, because the rows of
    one draw may depend on each other.
    """
    return 1

  def check(self, num_features: int, head_dim: int) -> None:
    """Raises ValueError for sizes that the component does not support."""

  @property
  def longest(self) -> int | None:
    """Length of the longest sequence it can map; None for no limit."""
    return None

  def check_length(self, length: int) -> None:
    """Raises ValueError for a sequence longer than `longest`."""
    if self.longest is not None and length > self.longest:
      raise ValueError(
        f"component {self.info.name!r} has max_length={self.longest}, got a "
        f"sequence of length {length}: build it with a larger max_length."
      )

  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    """Returns the learnable parameters of one head, float32; ``{}`` if none."""
    return {}

  def start(self, params: Params, centres: Array, mean_key: Array) -> Params:
    """Returns parameters at which a fit to data may start.

    Args:
      params: from `init`.
      centres: of the scaled keys of this head, ``[M, H]``.
      mean_key: mean of the scaled keys, ``[H]``.
    """
    return params

  def draw(self, rng: Array, num_features: int, head_dim: int) -> Projection:
    """Draws random leaves beside the rows of W, float32; ``{}`` if none."""
    return {}

  def moments(
    self, query: Array, key: Array, query_mask: Mask, key_mask: Mask
  ) -> PyTree:
    """Returns the means over positions that `solve` needs; ``()`` if none.

    `solve` receives averages of them over examples. A product of two means that
    it needs must be a moment of its own, because the average of the products is
    not the product of the averages.

    Args:
      query: ``[T, H]`` float32, scaled.
      key: ``[S, H]`` float32, scaled.
      query_mask: ``[T]`` bool or None: queries that count.
      key_mask: ``[S]`` bool or None: keys that count.
    """
    return ()

  def solve(self, moments: PyTree) -> PyTree:
    """Returns the best parameters for data with these moments; () if none."""
    return ()

  def prepare(self, state: ComponentState, head_dim: int) -> ComponentState:
    """Computes what all tokens share, and returns the state that holds it."""
    return state

  def realise_rows(
    self, rows: WeightSample, num_features: int, state: ComponentState
  ) -> WeightSample:
    """Turns the rows of the weight matrix into the rows of `log_features`.

    It is called once for all tokens. For example, it turns stored uniforms into
    random degrees.
    """
    return rows

  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    """Computes log-magnitudes and factors of the features.

    Args:
      x: ``[T, H]`` float32, scaled.
      rows: rows of W of this head, from `realise_rows`.
      side: "query" or "key".
      state: parameters, random leaves and stats of this head.

    Returns:
      ``log_magnitude [T, F]`` (or ``[T, 1]``) and ``factor [T, F]`` or None.
    """
    raise NotImplementedError

  def query_features(
    self, x: Array, rows: WeightSample, state: ComponentState
  ) -> LogFeatures:
    """Computes `log_features` of queries, perhaps without a factor per token.

    Attention divides by a sum over keys, which cancels a factor that all
    features of a query share, so an override need not compute it.
    """
    return self.log_features(x, rows, "query", state)

  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    """Returns the exact kernel, for x and y ``[..., H]`` -> ``[...]``."""
    raise NotImplementedError

  def log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    """Returns log E Z^2, where Z = phi(x) . phi(y) from one row.

    The relative variance of M independent rows is
    ``(exp(log_second_moment - 2 log K) - 1) / M``.

    Args:
      x: ``[..., H]`` float32, scaled.
      y: ``[..., H]`` float32, scaled; broadcast against x.
      state: as in `log_features`.

    Returns:
      ``[...]`` float32.

    Raises:
      NotImplementedError: no formula is known.
    """
    raise NotImplementedError(
      f"the second moment of component {self.info.name!r} is not known."
    )


@dataclasses.dataclass(frozen=True)
class KernelComponent(Component):
  """Base of the components that estimate the softmax or Gaussian kernel.

  Args:
    kernel: "softmax", exp(x . y), or "gaussian", exp(-|x - y|^2 / 2). Gaussian
      attention is softmax attention with the key bias -|y|^2 / 2: another
      layer, not another way to compute the same one.
  """

  kernel: str = "softmax"

  def __post_init__(self) -> None:
    check_choice("kernel", self.kernel, KERNELS)

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    return KERNELS[self.kernel](x, y)

  @override
  def log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    softmax = self.softmax_log_second_moment(x, y, state)
    if self.kernel == "softmax":
      return softmax
    return softmax - 2.0 * (half_square(x) + half_square(y))[..., 0]

  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    """Returns `log_second_moment` at kernel="softmax"."""
    return super().log_second_moment(x, y, state)

  def moments_at(self, query: Array, key: Array) -> PyTree:
    """Returns the `moments` of one query and one key, ``[H]`` each."""
    return self.moments(query[None], key[None], None, None)

  def recentre(self, moments: PyTree, scatter: PyTree) -> PyTree:
    """Moves `moments` about each example's own centre to one shared centre.

    Args:
      moments: averages over examples, each about its own centre.
      scatter: average of `moments_at` the examples' centres, minus `moments_at`
        the shared centre.
    """
    return jax.tree.map(jnp.add, moments, scatter)

  def gaussian_shift(self, x: Array) -> Array:
    """Returns this kernel's log-feature minus the softmax one, ``[T, 1]``."""
    if self.kernel == "gaussian":
      return -half_square(x)
    return jnp.zeros((x.shape[0], 1), x.dtype)


def project(x: Array, rows: Array) -> Array:
  """Projects ``x [T, H]`` on ``rows [M, H]``, in full float32: ``[T, M]``.

  Products become exponents, where an absolute error turns into a relative one.
  """
  return jnp.einsum(
    "th,mh->tm", x, rows, precision="highest", preferred_element_type=x.dtype
  )


def half_square(x: Array) -> Array:
  """Returns ``|x|^2 / 2`` over the last axis: ``[..., H] -> [..., 1]``."""
  return 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)


def to_log_features(values: Array) -> LogFeatures:
  """Splits features ``[T, F]`` into each token's largest size and a factor."""
  size = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
  size = jax.lax.stop_gradient(jnp.where(size > 0.0, size, 1.0))
  return LogFeatures(jnp.log(size), values / size)


def log_cosh(t: Array) -> Array:
  """Returns log cosh t, without overflow."""
  t = jnp.abs(t)
  return t + jnp.log1p(jnp.exp(-2.0 * t)) - math.log(2.0)


def norm(x: Array) -> Array:
  """Returns |x|, ``[..., H] -> [..., 1]``; its gradient is zero at 0."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  is_zero = square == 0.0
  return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def angle(x: Array, y: Array) -> Array:
  """Returns the angle of x and y ``[..., H]``, accurate at 0 and pi, too."""
  u, v = x * norm(y), y * norm(x)
  return 2.0 * jnp.arctan2(norm(u - v), norm(u + v))[..., 0]


def masked_mean(values: Array, mask: Mask) -> Array:
  """Returns the mean over axis 0 where `mask`; zeros if it is all False."""
  if mask is None:
    return jnp.mean(values, axis=0)
  mask = jnp.reshape(mask, mask.shape + (1,) * (values.ndim - 1))
  total = jnp.sum(jnp.where(mask, values, 0.0), axis=0)
  return total / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)


def covariance(mean_product: Array, product_of_means: Array) -> Array:
  """Returns the difference, exactly zero where it is only rounding.

  Args:
    mean_product: an average over examples of products.
    product_of_means: the product of the averages, of the same shape.
  """
  difference = mean_product - product_of_means
  size = jnp.abs(mean_product) + jnp.abs(product_of_means)
  return jnp.where(jnp.abs(difference) > 1e-5 * size, difference, 0.0)
