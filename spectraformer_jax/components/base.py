"""What a component function is: f in phi(x) = f(W x, x)."""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.kernels import KERNELS, check_kernel
from spectraformer_jax.registry import Registry
from spectraformer_jax.typing import (
  Array,
  LogFeatures,
  Params,
  Projection,
  PyTree,
  Side,
  WeightSample,
)

COMPONENTS = Registry("component")


@dataclasses.dataclass(frozen=True)
class ComponentInfo:
  """Static facts about a component; tables and tests are made from them.

  Attributes:
    name: registry name.
    family: place in the taxonomy: "trigonometric", "exponential", "dense
      exponential", "discrete", "hybrid" or "own kernel".
    estimates: the kernel it estimates, in words or a formula.
    formula: the feature of one row.
    positive: features are never negative, so normalizers never are.
    features: feature dim as text: "M", "2M", ...
    variance: relative variance of one row, or "" where not known.
    cost: per token, beside the projection.
    good_for: when to use it.
    avoid: when not to use it.
    source: paper and equation.
    row_law: name of the law of the rows it needs; "none" if it has no rows.
    causal_safe: features of a token depend on that token alone.
    positional: they also depend on where it stands in its sequence.
    even: rows w and -w give the same estimate, so that a matrix of rows and
      their negatives repeats each of them.
  """

  name: str
  family: str
  estimates: str
  formula: str
  positive: bool
  features: str
  source: str
  variance: str = ""
  cost: str = "F exponentials"
  good_for: str = ""
  avoid: str = ""
  row_law: str = "gaussian"
  causal_safe: bool = True
  positional: bool = False
  even: bool = False


class ComponentState(NamedTuple):
  """All that a component knows besides x and the rows, for one head.

  Attributes:
    params: learnable leaves from `Component.init`.
    random: drawn leaves from `Component.draw` (a second projection, phases).
    stats: data-dependent parameters from `Component.solve`, or ``()``.
    position: where in its sequence the first token of x stands; None is 0.
  """

  params: Params
  random: Projection
  stats: PyTree
  position: Array | int | None = None


@dataclasses.dataclass(frozen=True)
class Component:
  """Base of all component functions f.

  A subclass is a frozen dataclass whose fields are its options, with a class
  attribute `info`, a `log_features` and a `kernel_value`. All methods are pure,
  work in float32 and see one head of one example: heads and batch are added by
  `vmap`. Features are laid out with the row axis innermost, so that F is a
  multiple of the number of rows; the caller adds ``1/sqrt(M)``, row weights and
  signs.
  """

  info: ClassVar[ComponentInfo]

  @property
  def needs_stats(self) -> bool:
    """Whether `log_features` cannot work without data-dependent stats."""
    return False

  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    """F; None if it depends on head_dim and that is not known."""
    del head_dim
    return num_features

  def num_rows(self, num_features: int) -> int:
    """Rows of W that `num_features` features take."""
    return num_features

  @property
  def row_draws(self) -> int:
    """Independent draws of W, of equal size, that the rows are stacked from.

    More than one where features multiply rows: those of one draw are coupled.
    """
    return 1

  def check(self, num_features: int, head_dim: int) -> None:
    """Raises ValueError for sizes it cannot serve."""

  @property
  def longest(self) -> int | None:
    """Length of the longest sequence it can map; None without a bound."""
    return None

  def check_length(self, length: int) -> None:
    """Raises ValueError for a sequence that is too long for it."""
    if self.longest is not None and length > self.longest:
      raise ValueError(
        f"component {self.info.name!r} has max_length={self.longest}, got a "
        f"sequence of length {length}: build it with a larger max_length."
      )

  def init(self, rng: Array, head_dim: int) -> Params:
    """Learnable parameters of one head, float32; ``{}`` if none."""
    del rng, head_dim
    return {}

  def draw(self, rng: Array, num_features: int, head_dim: int) -> Projection:
    """Random leaves beside the rows of W, float32; ``{}`` if none."""
    del rng, num_features, head_dim
    return {}

  def moments(
    self,
    query: Array,
    key: Array,
    query_mask: Array | None,
    key_mask: Array | None,
  ) -> PyTree:
    """What `solve` needs to know of the data; means, so they can be averaged.

    Where `solve` needs a product of means, the product is a moment of its own:
    its average over examples is not the product of the averages.

    Args:
      query: ``[T, H]`` float32, scaled.
      key: ``[S, H]`` float32, scaled.
      query_mask: ``[T]`` bool or None: queries that count.
      key_mask: ``[S]`` bool or None.
    """
    del query, key, query_mask, key_mask
    return ()

  def solve(self, moments: PyTree) -> PyTree:
    """Closed-form parameters for data with these moments; () if none."""
    del moments
    return ()

  def prepare(self, state: ComponentState, head_dim: int) -> ComponentState:
    """The state with what is the same for all tokens worked out, once."""
    del head_dim
    return state

  def realise_rows(
    self, rows: WeightSample, num_features: int, state: ComponentState
  ) -> WeightSample:
    """The rows that `log_features` takes, from those the matrix made.

    Done once for all tokens. For laws whose rows are stored as uniforms.
    """
    del num_features, state
    return rows

  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    """Log-magnitudes and factors of the features.

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
    """`log_features` of queries, times any factor of each token.

    Attention divides by a sum over keys, in which such a factor cancels; what
    only the token decides may be left out here.
    """
    return self.log_features(x, rows, "query", state)

  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    """The exact kernel estimated, for x and y ``[..., H]`` -> ``[...]``."""
    raise NotImplementedError

  def log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    """Logarithm of E Z^2, Z = phi(x) . phi(y) from one row alone.

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

  def __post_init__(self):
    check_kernel(self.kernel)

  def kernel_value(self, x, y, state):
    """See `Component.kernel_value`."""
    del state
    return KERNELS[self.kernel](x, y)

  def log_second_moment(self, x, y, state):
    """See `Component.log_second_moment`."""
    softmax = self.softmax_log_second_moment(x, y, state)
    if self.kernel == "softmax":
      return softmax
    return softmax - 2.0 * (half_square(x) + half_square(y))[..., 0]

  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    """`log_second_moment` for kernel="softmax"; the Gaussian one follows."""
    return super().log_second_moment(x, y, state)

  def scatter(self, query_mean: Array, key_mean: Array) -> PyTree:
    """What the means ``[H]`` of an example would have as `moments`, alone."""
    return self.moments(query_mean[None], key_mean[None], None, None)

  def add_scatter(self, moments: PyTree, scatter: PyTree) -> PyTree:
    """`moments` about each example's means, made those about one centre.

    Args:
      moments: averages over examples, each about its own centre.
      scatter: average of `scatter` of the examples' centres, less that of the
        one centre.
    """
    return jax.tree.map(jnp.add, moments, scatter)

  def gaussian_shift(self, x: Array) -> Array:
    """``[T, 1]``: what turns a softmax log-feature into this kernel's one."""
    if self.kernel == "gaussian":
      return -half_square(x)
    return jnp.zeros((x.shape[0], 1), x.dtype)


def project(x: Array, rows: Array) -> Array:
  """``x [T, H]``, ``rows [M, H]`` -> ``[T, M]`` at full float32 precision.

  A rounded exponent costs far more accuracy than a rounded feature.
  """
  return jnp.einsum(
    "th,mh->tm", x, rows, precision="highest", preferred_element_type=x.dtype
  )


def half_square(x: Array) -> Array:
  """``|x|^2 / 2`` over the last axis, kept: ``[..., H] -> [..., 1]``."""
  return 0.5 * jnp.sum(jnp.square(x), axis=-1, keepdims=True)


def sized(values: Array) -> LogFeatures:
  """Features ``[T, F]`` as the largest size in each row, and what is left."""
  size = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
  size = jax.lax.stop_gradient(jnp.where(size > 0.0, size, 1.0))
  return LogFeatures(jnp.log(size), values / size)


def log_cosh(t: Array) -> Array:
  """The logarithm of cosh t, without overflow."""
  t = jnp.abs(t)
  return t + jnp.log1p(jnp.exp(-2.0 * t)) - math.log(2.0)


def angle(x: Array, y: Array) -> Array:
  """The angle between x and y ``[..., H]``, accurate at 0 and pi, too."""

  def norm(z):
    square = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
    is_zero = square == 0.0  # where the root has no gradient
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))

  u, v = x * norm(y), y * norm(x)
  return 2.0 * jnp.arctan2(norm(u - v), norm(u + v))[..., 0]


def masked_mean(values: Array, mask: Array | None) -> Array:
  """Mean over the first axis where `mask`; zeros if it hides everything."""
  if mask is None:
    return jnp.mean(values, axis=0)
  keep = jnp.reshape(mask, mask.shape + (1,) * (values.ndim - 1))
  total = jnp.sum(jnp.where(keep, values, 0.0), axis=0)
  return total / jnp.maximum(jnp.sum(mask), 1).astype(values.dtype)


def covariance(mean_product: Array, product_of_means: Array) -> Array:
  """The difference, exactly zero where it is no more than rounding.

  Args:
    mean_product: an average over examples of products.
    product_of_means: the product of the averages, of the same shape.
  """
  difference = mean_product - product_of_means
  size = jnp.abs(mean_product) + jnp.abs(product_of_means)
  return jnp.where(jnp.abs(difference) > 1e-5 * size, difference, 0.0)


def frozen(tree: PyTree) -> PyTree:
  """The tree without gradient: statistics are constants of a step."""
  return jax.tree.map(jax.lax.stop_gradient, tree)


def options(component: Component) -> dict[str, Any]:
  """The options of a component, by name."""
  return {
    field.name: getattr(component, field.name)
    for field in dataclasses.fields(component)
  }
