"""Learners: noise from another weight matrix, transformed by parameters.

A learner draws noise (the rows of an approximator) and transforms it into rows.
The redraw interval of the training loop decides what is learnt: with new noise
at every step gradients are those of the kernel; with fixed noise they are those
of ordinary learnt features. Weight decay skips the parameters of learners: it
would shrink the frequencies, and so change the kernel.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.registry import info_from_options
from spectraformer_jax.typing import Array, Params, Projection, WeightSample
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.row_laws import RowLaw

# Least norm of a row: 0 has no `inverse_softplus`, and a zero row no direction.
MIN_NORM = 1e-6

# Makes the `WeightMatrixInfo` of a learner from its remaining fields.
learner_facts = functools.partial(
  WeightMatrixInfo, group="learner", marginals="exact", learnable=True
)


@dataclasses.dataclass(frozen=True)
class Learner(WeightMatrix):
  """Base of the learners that transform the rows of another weight matrix.

  With the parameters of `init`, `transform` keeps the law of Gaussian rows, so
  every component starts unbiased. It keeps dependence between rows of the noise
  (orthogonal rows, stratified norms) as well, and with it the lower variance.

  Args:
    base: name of the weight matrix whose rows are the noise; its rows must be
      Gaussian and of equal weight.

  Attributes:
    facts: `info` for a base of exact marginals that accepts any sizes.

  Raises:
    ValueError: unknown `base`, or one that makes other rows.
  """

  facts: ClassVar[WeightMatrixInfo]

  base: str = "orf"

  def __post_init__(self) -> None:
    info = self.base_matrix.info
    reasons = {
      "is a learner itself": info.learnable,
      "makes no Gaussian rows": "gaussian" not in info.row_laws,
      "has heavy tails": info.trig_only,
      "weighs its rows": info.weighted or info.signed,
    }
    for reason, applies in reasons.items():
      if applies:
        raise ValueError(
          "base must name a weight matrix of Gaussian rows and equal weights, "
          f"got {self.base!r}, which {reason}; 'orf' is usual."
        )

  @property
  def base_matrix(self) -> WeightMatrix:
    """The matrix that draws the noise."""
    return WEIGHT_MATRICES.build(self.base)

  def _info(self) -> WeightMatrixInfo:
    noise = self.base_matrix.info
    return dataclasses.replace(
      self.facts, marginals=noise.marginals, constraint=noise.constraint
    )

  info = info_from_options(_info)

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    self.base_matrix.check(num_rows, head_dim)

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    return self.base_matrix.draw(rng, num_rows, head_dim, law)

  def transform(self, params: Params, noise: Array) -> Array:
    """Returns the rows ``[M, H]`` for noise ``[M, H]`` float32."""
    raise NotImplementedError

  @override
  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    return WeightSample(self.transform(params, noise_of(projection)))


def noise_of(projection: Projection) -> Array:
  """Returns the noise ``[M, H]`` in float32, whatever its stored dtype."""
  return projection["w"].astype(jnp.float32)


def soft_clip(x: Array, low: float, high: float) -> Array:
  """Clips smoothly to (low, high): nearly the identity around 0.

  Unlike that of a hard clip, the gradient does not drop to 0 at the bounds.

  Args:
    x: any shape, float32.
    low: below 0.
    high: above 0.

  Returns:
    Same shape: ``high tanh(x / high)`` above 0, ``low tanh(x / low)`` below.

  Example:
    >>> soft_clip(jnp.array([-50.0, 0.0, 50.0]), -2.0, 1.0).tolist()
    [-2.0, 0.0, 1.0]
  """
  bound = jnp.where(x < 0.0, low, high).astype(x.dtype)
  return bound * jnp.tanh(x / bound)


def check_log_sigma_range(low: float, high: float) -> None:
  """Raises ValueError unless low < 0 < high: log sigma starts at about 0."""
  if not low < 0.0 < high:
    raise ValueError(
      "min_log_sigma and max_log_sigma must lie on either side of 0, got "
      f"{low!r} and {high!r}; -3 and 1 are usual."
    )


def inverse_softplus(x: Array) -> Array:
  """Returns y such that ``jax.nn.softplus(y) == x``, for x > 0.

  Example:
    >>> import jax
    >>> float(jax.nn.softplus(inverse_softplus(jnp.float32(2.0))))
    2.0
  """
  return x + jnp.log(-jnp.expm1(-x))
