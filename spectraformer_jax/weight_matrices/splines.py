"""Rows transformed by learnable increasing, piecewise linear functions."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.registry import check_int
from spectraformer_jax.typing import Array, Params
from spectraformer_jax.weight_matrices import base, learners

# Knots reach from -SPAN to SPAN; 1 Gaussian entry in 16,000 lies outside.
SPAN = 4.0
# Distance of the outermost knots of the radial spline from sqrt(head_dim): more
# than four standard deviations of the norm of a Gaussian row.
RADIAL_SPAN = 3.0


def identity_increments(knots: np.ndarray) -> Array:
  """Returns increments for which `monotone_spline` is the identity.

  Args:
    knots: ``[K + 1]``, increasing.

  Returns:
    ``[K]`` float32.
  """
  return learners.inverse_softplus(jnp.asarray(np.diff(knots), jnp.float32))


def monotone_spline(
  x: Array, knots: np.ndarray, start: Array | float, increments: Array
) -> Array:
  """Evaluates an increasing function with learnable values at the knots.

  The value at knot 0 is `start`; the value at knot i is that at knot i - 1 plus
  ``softplus(increments[i - 1])``. The slope outside the knots is 1. The code
  adds ramps, one per interval, since a look-up of the interval would have a
  scatter as its gradient.

  Args:
    x: any shape, float32.
    knots: ``[K + 1]``, increasing.
    start: value at knot 0; broadcasts against x.
    increments: ``[K]``, followed by axes that broadcast against those of x.

  Returns:
    Same shape as x.

  Example:
    >>> knots = np.linspace(-4.0, 4.0, 17)
    >>> p = identity_increments(knots)
    >>> x = jnp.array([-9.0, -0.3, 7.0])
    >>> y = monotone_spline(x, knots, jnp.float32(-4.0), p)
    >>> bool(jnp.allclose(y, x, atol=1e-5))
    True
  """
  rises = jax.nn.softplus(increments)
  below = jnp.minimum(x - np.float32(knots[0]), 0.0)
  above = jnp.maximum(x - np.float32(knots[-1]), 0.0)
  total = start + below + above
  for i, (left, right) in enumerate(zip(knots, knots[1:], strict=False)):
    ramp = (x - np.float32(left)) * np.float32(1.0 / (right - left))
    total = total + rises[i] * jnp.clip(ramp, 0.0, 1.0)
  return total


@base.WEIGHT_MATRICES.register("bbq")
@dataclasses.dataclass(frozen=True)
class BBQ(learners.Learner):
  r"""Black-box quantiles: a learnable law for each coordinate.

  .. math::
    w_{mj} = q_j(\epsilon_{mj}), \quad q_j \text{ increasing}

  :math:`q_j` turns N(0, 1) into the law of coordinate j, so it is the quantile
  function of this law after the normal cdf. It is piecewise linear between
  knots from -4 to 4, of slope 1 outside. Its increments go through softplus, so
  it increases for any parameters. It starts as the identity. The learnt kernel
  is a product over coordinates. Bases that spread entries evenly ("lhs", "qmc")
  are suitable as well as "orf".

  Args:
    base: as for `Learner`.
    num_pieces: number of intervals between knots.

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

  facts = learners.learner_facts(
    name="bbq",
    source="Tompkins et al. 2019, Black Box Quantiles",
    summary="a learnable increasing function of each coordinate",
    good_for="product kernels of any shape; trigonometric maps first",
    cost="as the base; num_pieces M H products at every step",
    variance="at the start as the base",
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive_int("num_pieces", self.num_pieces)

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    increments = identity_increments(self._knots())
    return {
      "start": jnp.full((head_dim,), -SPAN, jnp.float32),
      "increments": jnp.tile(increments[:, None], (1, head_dim)),
    }

  @override
  def transform(self, params: Params, noise: Array) -> Array:
    start, increments = params["start"], params["increments"]
    return monotone_spline(
      noise, self._knots(), start[None, :], increments[:, None, :]
    )

  def _knots(self) -> np.ndarray:
    """Returns the knots ``[num_pieces + 1]``."""
    return np.linspace(-SPAN, SPAN, self.num_pieces + 1)


@base.WEIGHT_MATRICES.register("learned_radial")
@dataclasses.dataclass(frozen=True)
class LearnedRadial(learners.Learner):
  r"""Rows with a learnable law of norms: any isotropic kernel.

  .. math::
    w_m = g(|\epsilon_m|)\, \epsilon_m / |\epsilon_m|, \quad
    g \text{ increasing}, \quad g(0) = 0

  Directions stay uniform, so the kernel depends only on :math:`|x - y|` (for a
  positive map on :math:`|x + y|`) and is a mean over norms r of kernels
  :math:`{}_0F_1(; H/2; -r^2 |x - y|^2 / 4)`. g is piecewise linear between 0
  and knots around sqrt(H), has slope 1 beyond them, and starts as the identity.

  Args:
    base: as for `Learner`. The default, "orf_strat", has orthogonal rows with
      one norm per quantile cell, which samples the norms most evenly.
    num_pieces: number of intervals between knots, each of which has one
      parameter per head.

  Raises:
    ValueError: `num_pieces` is not an integer of at least 2; unknown `base`.

  References:
    Tompkins et al., Black Box Quantiles for Kernel Learning, 2019, applied to
    the norms of Yu et al., Orthogonal Random Features, 2016, equation 4.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "learned_radial", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6)
    >>> v.params["rows"]["increments"].shape
    (1, 16)
  """

  base: str = "orf_strat"
  num_pieces: int = 16

  facts = learners.learner_facts(
    name="learned_radial",
    source="Tompkins et al. 2019; Yu et al. 2016, equation 4",
    summary="a learnable increasing function of the rows' norms",
    good_for="isotropic kernels of any shape, with few numbers to learn",
    cost="as the base; num_pieces M products at every step",
    variance="at the start as the base: trig 0.36 at scale 0.2, H=32",
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    check_int("num_pieces", self.num_pieces, 2)

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    return {"increments": identity_increments(self._knots(head_dim))}

  @override
  def transform(self, params: Params, noise: Array) -> Array:
    norms = jnp.sqrt(jnp.sum(jnp.square(noise), axis=-1))
    norms = jnp.maximum(norms, learners.MIN_NORM)
    knots = self._knots(noise.shape[-1])
    learned = monotone_spline(norms, knots, 0.0, params["increments"])
    return (learned / norms)[:, None] * noise

  def _knots(self, head_dim: int) -> np.ndarray:
    """Returns 0 and evenly spaced knots over the norms of Gaussian rows."""
    end = math.sqrt(head_dim) + RADIAL_SPAN
    first = max(math.sqrt(head_dim) - RADIAL_SPAN, end / self.num_pieces)
    return np.append(0.0, np.linspace(first, end, self.num_pieces))
