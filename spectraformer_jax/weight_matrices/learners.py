"""What the learners share: noise from another matrix, and bounded scales.

A learner draws noise, the rows of an approximator, and turns them into its own
rows by learnable parameters. New noise at every step (a redraw) gives gradients
of the kernel itself, noise that stays makes ordinary learnt features: the
redraw interval of the training loop decides. Nothing here is subject to weight
decay: shrinking frequencies would change the kernel.
"""

import dataclasses

import jax.numpy as jnp

from spectraformer_jax.typing import Array, Params, Projection, WeightSample
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)


@dataclasses.dataclass(frozen=True)
class Learner(WeightMatrix):
  """Base of the learners that transform the rows of another weight matrix.

  At initialisation `transform` leaves the law of Gaussian rows as it is, so
  that every component starts unbiased. Couplings of the noise (orthogonal rows,
  stratified norms) carry over, and with them less variance.

  Args:
    base: name of the weight matrix whose rows are the noise, one of Gaussian
      rows and equal weights.

  Raises:
    ValueError: unknown `base`, or one that cannot be noise.
  """

  base: str = "orf"

  def __post_init__(self):
    _check_base(self.base)

  @property
  def base_matrix(self) -> WeightMatrix:
    """The matrix that draws the noise."""
    return WEIGHT_MATRICES.build(self.base)

  def check(self, num_rows, head_dim):
    """See `WeightMatrix.check`."""
    self.base_matrix.check(num_rows, head_dim)

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`: leaf "w" is the noise."""
    return self.base_matrix.draw(rng, num_rows, head_dim, law)

  def transform(self, params: Params, noise: Array) -> Array:
    """The rows ``[M, H]`` made from noise ``[M, H]`` float32."""
    raise NotImplementedError

  def rows(self, params, projection, context=()):
    """See `WeightMatrix.rows`."""
    del context
    return WeightSample(self.transform(params, noise_of(projection)))

  def learner_info(self, **facts) -> WeightMatrixInfo:
    """Facts of a learner; marginals and constraint are those of its noise."""
    base = self.base_matrix.info
    facts.setdefault("constraint", base.constraint)
    return WeightMatrixInfo(
      group="learner", marginals=base.marginals, learnable=True, **facts
    )


def noise_of(projection: Projection) -> Array:
  """The noise ``[M, H]`` in float32, whatever it is stored in."""
  return projection["w"].astype(jnp.float32)


def soft_clip(x: Array, low: float, high: float) -> Array:
  """Smooth clip into (low, high), the identity around 0.

  Unlike a hard clip it never stops the gradient.

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
  """ValueError unless low < 0 < high: the start, 0, lies inside."""
  if not low < 0.0 < high:
    raise ValueError(
      "min_log_sigma and max_log_sigma must lie on either side of 0, got "
      f"{low!r} and {high!r}; -3 and 1 are usual."
    )


def inverse_softplus(x: Array) -> Array:
  """What `jax.nn.softplus` maps to x > 0.

  Example:
    >>> import jax
    >>> float(jax.nn.softplus(inverse_softplus(jnp.float32(2.0))))
    2.0
  """
  return x + jnp.log(-jnp.expm1(-x))


def _check_base(base: str) -> None:
  """ValueError unless `base` draws Gaussian rows of equal weight."""
  info = WEIGHT_MATRICES.build(base).info
  reasons = {
    "is a learner itself": info.learnable,
    "makes no Gaussian rows": "gaussian" not in info.row_laws,
    "has heavy tails": info.trig_only,
    "weighs its rows": info.weighted or info.signed,
  }
  for reason, applies in reasons.items():
    if applies:
      raise ValueError(
        f"base must name a weight matrix of Gaussian rows and equal weights, "
        f"got {base!r}, which {reason}; 'orf' is usual."
      )
