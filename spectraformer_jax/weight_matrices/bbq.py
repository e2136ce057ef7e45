"""Rows through learnable quantile functions, one per coordinate."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.weight_matrices.base import WEIGHT_MATRICES
from spectraformer_jax.weight_matrices.learners import Learner
from spectraformer_jax.weight_matrices.monotone_spline import (
  identity_increments,
  monotone_spline,
)

# Knots span these normal scores; beyond them lies 1 row entry in 16,000.
SPAN = 4.0


@WEIGHT_MATRICES.register("bbq")
@dataclasses.dataclass(frozen=True)
class BBQ(Learner):
  r"""Black-box quantiles: a learnable law for each coordinate.

  .. math::
    w_{mj} = q_j(\epsilon_{mj}), \quad q_j \text{ increasing}

  :math:`q_j` is the quantile function of coordinate j written in normal scores:
  piecewise linear between knots from -4 to 4, of slope 1 outside; its
  increments go through softplus, so any parameters make it increase. It starts
  as the identity. The kernel it learns is a product over coordinates. Bases
  that spread entries evenly, "lhs" or "qmc", suit it as well as "orf".

  Args:
    base: see `Learner`.
    num_pieces: intervals between knots.

  Raises:
    ValueError: `num_pieces` is not a positive integer; unknown `base`.

  References:
    Tompkins, Senanayake, Morere and Ramos, Black Box Quantiles for Kernel
    Learning, 2019.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "bbq", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6)
    >>> {name: leaf.shape for name, leaf in v.params["rows"].items()}
    {'increments': (1, 16, 6), 'start': (1, 6)}
  """

  num_pieces: int = 16

  def __post_init__(self):
    super().__post_init__()
    check_positive_int("num_pieces", self.num_pieces)

  @property
  def info(self):
    """Facts; marginals are those of the base."""
    return self.learner_info(
      name="bbq",
      source="Tompkins et al. 2019, Black Box Quantiles",
      summary="a learnable increasing function of each coordinate",
      good_for="product kernels of any shape; trigonometric maps first",
      cost="that of the base; num_pieces M H products at every step",
      variance="at the start that of the base",
    )

  def init(self, rng, num_rows, head_dim):
    """See `WeightMatrix.init`."""
    del rng, num_rows
    increments = identity_increments(self._knots())
    return {
      "start": jnp.full((head_dim,), -SPAN, jnp.float32),
      "increments": jnp.tile(increments[:, None], (1, head_dim)),
    }

  def transform(self, params, noise):
    """See `Learner.transform`."""
    start, increments = params["start"], params["increments"]
    return monotone_spline(
      noise, self._knots(), start[None, :], increments[:, None, :]
    )

  def _knots(self) -> np.ndarray:
    """``[num_pieces + 1]``."""
    return np.linspace(-SPAN, SPAN, self.num_pieces + 1)
