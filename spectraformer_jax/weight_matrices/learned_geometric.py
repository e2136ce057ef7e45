"""Orthogonal rows with learnable directions, or learnable norms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.typing import Array, WeightSample
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.building_blocks import chi_norms
from spectraformer_jax.weight_matrices.learners import Learner, inverse_softplus
from spectraformer_jax.weight_matrices.monotone_spline import (
  identity_increments,
  monotone_spline,
)

# Knots of the radial spline reach this far around sqrt(head_dim): more than
# four standard deviations of the norm of a Gaussian row.
RADIAL_SPAN = 3.0

# Below this a norm of float32 has no inverse under softplus.
MIN_NORM = 1e-6


def reflections(vectors: Array) -> Array:
  r"""Products of Householder reflections, :math:`\prod_k (I - 2 u_k u_k^\top)`.

  Args:
    vectors: ``[blocks, K, H]``, of any length (u is the unit vector); a zero
      vector reflects nothing.

  Returns:
    ``[blocks, H, H]``, orthogonal for any vectors.

  Example:
    >>> q = reflections(jnp.ones((1, 1, 2)))
    >>> q[0].round(4).tolist()
    [[0.0, -1.0], [-1.0, 0.0]]
  """
  blocks, _, head_dim = vectors.shape
  square = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
  nonzero = square > 0.0
  unit = vectors * jax.lax.rsqrt(jnp.where(nonzero, square, 1.0))
  unit = jnp.where(nonzero, unit, 0.0)

  def reflect(product, u):
    along = jnp.einsum("bij,bj->bi", product, u, precision="highest")
    return product - 2.0 * along[..., None] * u[:, None, :], None

  start = jnp.broadcast_to(
    jnp.eye(head_dim, dtype=jnp.float32), (blocks, head_dim, head_dim)
  )
  return jax.lax.scan(reflect, start, jnp.swapaxes(unit, 0, 1))[0]


def haar_reflections(rng: Array, num_blocks: int, dim: int) -> Array:
  """Vectors whose `reflections`, with random column signs, are Haar.

  Vector k is ``x + sign(x_k) |x| e_k`` for x of N(0, I) on coordinates k and
  after (Stewart 1980). Gaussian vectors on all coordinates would not do.

  Args:
    rng: PRNG key.
    num_blocks: how many matrices.
    dim: of each.

  Returns:
    ``[num_blocks, dim - 1, dim]`` float32.
  """
  x = jax.random.normal(rng, (num_blocks, dim - 1, dim), dtype=jnp.float32)
  x = x * np.triu(np.ones((dim - 1, dim), np.float32))[None]
  length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
  own = jnp.diagonal(x, axis1=1, axis2=2)
  towards = jnp.where(own < 0.0, -length, length)
  return x + towards[..., None] * np.eye(dim - 1, dim, dtype=np.float32)[None]


@WEIGHT_MATRICES.register("learned_orf")
@dataclasses.dataclass(frozen=True)
class LearnedORF(WeightMatrix):
  r"""Orthogonal rows whose directions and norms are learnt.

  .. math::
    W_b = \mathrm{diag}(\mathrm{softplus}(\rho))\, \prod_{k=1}^{H-1}
    \Big(I - 2 \frac{v_k v_k^\top}{|v_k|^2}\Big)\, D_b

  Rows of a block are orthogonal for any parameters. At the start the vectors v
  are those that make a uniform (Haar) rotation, D is a drawn diagonal of random
  signs, kept in the projection, and the norms are a draw of the chi law: W
  starts as "orf". The parameters are the matrix, so there is nothing to redraw.

  References:
    Stewart, The Efficient Generation of Random Orthogonal Matrices, 1980; as
    parameters: Mhammedi et al., Efficient Orthogonal Parametrisation of
    Recurrent Neural Networks Using Householder Reflections, 2017 (1612.00188).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "learned_orf", num_features=8)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> {name: leaf.shape for name, leaf in v.params["rows"].items()}
    {'rho': (1, 8), 'v': (1, 2, 3, 4)}
    >>> v.projection["rows"]["signs"].shape
    (1, 2, 4)
  """

  info = WeightMatrixInfo(
    name="learned_orf",
    group="learner",
    marginals="exact",
    source="Stewart 1980; Mhammedi et al. 2017 (1612.00188)",
    summary="orthogonal rows from learnable reflections, learnable norms",
    good_for="all components",
    constraint="any num_features, head_dim >= 2",
    cost="H - 1 reflections of H x H per block, one after another, every step",
    variance="at the start as orf: trig 0.38, pos 0.76 at scale 0.2, H=32",
    learnable=True,
    redrawable=False,
  )

  def check(self, num_rows, head_dim):
    """See `WeightMatrix.check`."""
    if head_dim < 2:
      raise ValueError(
        "weight matrix 'learned_orf' needs head_dim >= 2, got head_dim="
        f"{head_dim}: a line has no directions to learn; use 'learned_radial'."
      )

  def init(self, rng, num_rows, head_dim):
    """See `WeightMatrix.init`."""
    direction_rng, norm_rng = jax.random.split(rng)
    blocks = -(-num_rows // head_dim)
    norms = chi_norms(norm_rng, num_rows, head_dim)
    return {
      "v": haar_reflections(direction_rng, blocks, head_dim),
      "rho": inverse_softplus(jnp.maximum(norms, MIN_NORM)),
    }

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`: leaf "signs" ``[blocks, H]``."""
    del law  # Gaussian only
    shape = (-(-num_rows // head_dim), head_dim)
    return {"signs": jax.random.rademacher(rng, shape, jnp.float32)}

  def rows(self, params, projection, context=()):
    """See `WeightMatrix.rows`."""
    del context
    norms = jax.nn.softplus(params["rho"])
    signs = projection["signs"].astype(jnp.float32)
    directions = reflections(params["v"]) * signs[:, None, :]
    stacked = directions.reshape(-1, signs.shape[-1])[: norms.shape[0]]
    return WeightSample(norms[:, None] * stacked)


@WEIGHT_MATRICES.register("learned_radial")
@dataclasses.dataclass(frozen=True)
class LearnedRadial(Learner):
  r"""Rows of a learnable law of norms: any isotropic kernel.

  .. math::
    w_m = g(|\epsilon_m|)\, \epsilon_m / |\epsilon_m|, \quad
    g \text{ increasing}, \quad g(0) = 0

  Directions stay uniform, so the kernel depends on :math:`|x - y|` (on
  :math:`|x + y|` for a positive map) alone and is a mixture of Gaussian kernels
  of all widths. g is piecewise linear between 0 and knots around sqrt(H), of
  slope 1 beyond, and starts as the identity.

  Args:
    base: see `Learner`; "orf_strat", orthogonal rows with one norm per quantile
      cell, samples the norms most evenly.
    num_pieces: intervals between knots: numbers to learn per head.

  Raises:
    ValueError: `num_pieces` is not an integer of at least 2; unknown `base`.

  References:
    Tompkins et al., Black Box Quantiles for Kernel Learning, 2019, for the
    norms of Yu et al., Orthogonal Random Features, 2016, equation 4.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "learned_radial", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6)
    >>> v.params["rows"]["increments"].shape
    (1, 16)
  """

  base: str = "orf_strat"
  num_pieces: int = 16

  def __post_init__(self):
    super().__post_init__()
    check_positive_int("num_pieces", self.num_pieces)
    if self.num_pieces < 2:
      raise ValueError(f"num_pieces must be at least 2, got {self.num_pieces}.")

  @property
  def info(self):
    """Facts; marginals are those of the base."""
    return self.learner_info(
      name="learned_radial",
      source="Tompkins et al. 2019; Yu et al. 2016, equation 4",
      summary="a learnable increasing function of the rows' norms",
      good_for="isotropic kernels of any shape, with few numbers to learn",
      cost="that of the base; num_pieces M products at every step",
      variance="at the start that of the base: trig 0.36 at scale 0.2, H=32",
    )

  def init(self, rng, num_rows, head_dim):
    """See `WeightMatrix.init`."""
    del rng, num_rows
    return {"increments": identity_increments(self._knots(head_dim))}

  def transform(self, params, noise):
    """See `Learner.transform`."""
    norms = jnp.sqrt(jnp.sum(jnp.square(noise), axis=-1))
    norms = jnp.maximum(norms, MIN_NORM)
    knots = self._knots(noise.shape[-1])
    learned = monotone_spline(norms, knots, 0.0, params["increments"])
    return (learned / norms)[:, None] * noise

  def _knots(self, head_dim: int) -> np.ndarray:
    """Zero, and evenly spaced knots where norms of Gaussian rows are."""
    end = math.sqrt(head_dim) + RADIAL_SPAN
    first = max(math.sqrt(head_dim) - RADIAL_SPAN, end / self.num_pieces)
    return np.append(0.0, np.linspace(first, end, self.num_pieces))
