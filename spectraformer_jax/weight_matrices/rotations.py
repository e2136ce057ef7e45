"""Orthogonal rows that are products of plane rotations or of reflections."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.typing import Array, Params, Projection, WeightSample
from spectraformer_jax.weight_matrices import base, learners, pieces
from spectraformer_jax.weight_matrices.row_laws import RowLaw, open_uniform

# Number of factors B P D of a butterfly matrix.
STAGES = 3


def butterfly_matrix(signs: Array, permutation: Array, angles: Array) -> Array:
  r"""Returns the orthogonal matrix :math:`B_3 P_3 D_3 B_2 P_2 D_2 B_1 P_1 D_1`.

  Layer l of a butterfly B rotates the planes of the axes i and i + 2^l.

  Args:
    signs: ``[3, n]`` float32, diagonals of D.
    permutation: ``[3, n]`` int32: P moves entry permutation[i] to i.
    angles: ``[3, log2 n, n/2]`` float32, radians.

  Returns:
    ``[n, n]`` float32.

  Example:
    >>> identity = jnp.tile(jnp.arange(4), (3, 1))
    >>> q = butterfly_matrix(jnp.ones((3, 4)), identity, jnp.zeros((3, 2, 2)))
    >>> bool((q == jnp.eye(4)).all())
    True
  """
  n = signs.shape[-1]
  matrix = jnp.eye(n, dtype=jnp.float32)
  for stage in range(signs.shape[0]):
    matrix = (signs[stage][:, None] * matrix)[permutation[stage]]
    for layer in range(angles.shape[1]):
      half = 1 << layer
      planes = jnp.reshape(matrix, (-1, 2, half, n))
      angle = jnp.reshape(angles[stage, layer], (-1, half, 1))
      cos, sin = jnp.cos(angle), jnp.sin(angle)
      low, high = planes[:, 0], planes[:, 1]
      planes = jnp.stack([cos * low - sin * high, sin * low + cos * high], 1)
      matrix = jnp.reshape(planes, (n, n))
  return matrix


@base.WEIGHT_MATRICES.register("butterfly")
@dataclasses.dataclass(frozen=True)
class Butterfly(base.WeightMatrix):
  r"""Butterfly matrices: random plane rotations in log2(n) layers.

  .. math::
    W_b = \mathrm{diag}(r)\, B_3 P_3 D_3\, B_2 P_2 D_2\, B_1 P_1 D_1, \quad
    r_m \sim \chi_H

  D: random signs; P: random permutations; B: log2(n) layers of n/2 rotations of
  planes by uniform angles; n: the least power of two that is at least H.
  Columns beyond H are dropped. If H = n, blocks are exactly orthogonal and
  directions nearly uniform: errors are those of `ORF`, the bias is about 0.01
  at most.

  Args:
    norms: "chi": norms of independent Gaussian rows; "sqrt_d": rows of norm
      sqrt(H) (in the mean square, if H < n); estimates then have about the mean
      given at "orf_sqrtd".
    learnable: the angles are parameters that start at a random draw. Blocks are
      orthogonal for any angles. Such a matrix cannot be redrawn.

  Raises:
    ValueError: unknown `norms`.

  References:
    Munkhoeva et al., Quadrature-based Features for Kernel Approximation, 2018
    (1802.03832); Dao et al., Learning Fast Algorithms for Linear
    Transforms Using Butterfly Factorizations, 2019 (1903.05895).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "butterfly", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=8).projection["rows"]["w"][0]
    >>> bool(abs(w[0] @ w[1]) < 1e-4)
    True
  """

  norms: str = "chi"
  learnable: bool = False

  facts = base.WeightMatrixInfo(
    name="butterfly",
    group="geometric",
    marginals="approximate",
    source="Munkhoeva et al. 2018 (1802.03832)",
    summary="orthogonal blocks of log2(n) layers of plane rotations",
    good_for="as orf (norms chi) or orf_sqrtd; learnable orthogonal rows",
    constraint="any num_features, any head_dim (padded to a power of two)",
    cost="3 M (log2(n) / 2 + 1) draws, 3 M n log2(n) flops",
    variance="trig 0.38, pos 0.77 at scale 0.2, H=32",
  )

  def __post_init__(self) -> None:
    pieces.check_norms(self.norms)

  def _info(self) -> base.WeightMatrixInfo:
    return dataclasses.replace(
      self.facts,
      variance=self.facts.variance if self.norms == "chi" else "as orf_sqrtd",
      learnable=self.learnable,
      redrawable=not self.learnable,
    )

  info = base.info_from_options(_info)

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    if not self.learnable:
      return {}
    return {"angles": _draw_angles(rng, num_rows, head_dim)}

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    sign_rng, permutation_rng, norm_rng, angle_rng = jax.random.split(rng, 4)
    n = pieces.next_power_of_two(head_dim)
    shape = (-(-num_rows // n), STAGES, n)
    drawn = {
      "signs": pieces.random_signs(sign_rng, shape),
      "permutation": pieces.random_permutations(permutation_rng, shape),
      "w": pieces.normal(norm_rng, (num_rows, head_dim)),
    }
    if self.learnable:
      return drawn
    angles = _draw_angles(angle_rng, num_rows, head_dim)
    return {"w": self._rotated_rows(drawn, angles)}

  @override
  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    if self.learnable:
      projection = {"w": self._rotated_rows(projection, params["angles"])}
    return super().rows(params, projection, context)

  def _rotated_rows(self, drawn: Projection, angles: Array) -> Array:
    """Returns rows ``[M, H]``; chi norms are those of the rows of leaf "w"."""
    signs = drawn["signs"]
    permutation = drawn["permutation"].astype(jnp.int32)
    blocks = jax.vmap(butterfly_matrix)(signs, permutation, angles)
    num_rows, head_dim = drawn["w"].shape
    n = signs.shape[-1]
    rows = jnp.reshape(blocks, (-1, n))[:num_rows, :head_dim]
    if self.norms == "chi":
      return pieces.rescale_rows(rows, drawn["w"])
    return np.float32(np.sqrt(n)) * rows


def _draw_angles(rng: Array, num_rows: int, head_dim: int) -> Array:
  """Draws uniform angles ``[blocks, 3, log2 n, n/2]``."""
  n = pieces.next_power_of_two(head_dim)
  shape = (-(-num_rows // n), STAGES, n.bit_length() - 1, n // 2)
  return 2.0 * np.pi * open_uniform(rng, shape)


def reflections(vectors: Array) -> Array:
  r"""Multiplies Householder reflections: :math:`\prod_k (I - 2 u_k u_k^\top)`.

  Args:
    vectors: ``[blocks, K, H]``, of any norm; :math:`u_k` is vector k divided by
      its norm. The factor of a zero vector is the identity.

  Returns:
    ``[blocks, H, H]``, orthogonal for any vectors.

  Example:
    >>> q = reflections(jnp.ones((1, 1, 2)))
    >>> q[0].round(4).tolist()
    [[0.0, -1.0], [-1.0, 0.0]]
  """
  num_blocks, _, head_dim = vectors.shape
  square = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
  nonzero = square > 0.0
  unit = vectors * jax.lax.rsqrt(jnp.where(nonzero, square, 1.0))
  unit = jnp.where(nonzero, unit, 0.0)

  def reflect(product: Array, u: Array) -> tuple[Array, None]:
    along = jnp.einsum("bij,bj->bi", product, u, precision="highest")
    return product - 2.0 * along[..., None] * u[:, None, :], None

  identity = jnp.eye(head_dim, dtype=jnp.float32)
  start = jnp.broadcast_to(identity, (num_blocks, head_dim, head_dim))
  return jax.lax.scan(reflect, start, jnp.swapaxes(unit, 0, 1))[0]


def haar_reflections(rng: Array, num_blocks: int, dim: int) -> Array:
  """Draws vectors whose `reflections`, with random column signs, are Haar.

  Vector k is ``x + sign(x_k) |x| e_k``, where x is N(0, I) on the coordinates k
  and above and zero on the others (Stewart 1980). Gaussian vectors on all
  coordinates would not give Haar matrices.

  Args:
    rng: PRNG key.
    num_blocks: number of matrices.
    dim: number of rows of each matrix.

  Returns:
    ``[num_blocks, dim - 1, dim]`` float32.
  """
  x = pieces.normal(rng, (num_blocks, dim - 1, dim))
  x = x * np.triu(np.ones((dim - 1, dim), np.float32))[None]
  length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1))
  diagonal = jnp.diagonal(x, axis1=1, axis2=2)
  signed = jnp.where(diagonal < 0.0, -length, length)
  return x + signed[..., None] * np.eye(dim - 1, dim, dtype=np.float32)[None]


@base.WEIGHT_MATRICES.register("learned_orf")
@dataclasses.dataclass(frozen=True)
class LearnedORF(base.WeightMatrix):
  r"""Orthogonal rows with learnable directions and norms.

  .. math::
    W_b = \mathrm{diag}(\mathrm{softplus}(\rho))\, \prod_{k=1}^{H-1}
    \Big(I - 2 \frac{v_k v_k^\top}{|v_k|^2}\Big)\, D_b

  Rows of a block are orthogonal for any parameters. At the start the product of
  reflections and D is a uniform (Haar) orthogonal matrix and the norms are
  drawn from the chi law, so W starts as "orf". D is a diagonal of random signs
  in the projection; it is never redrawn, since the learnt reflections fit these
  signs only.

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

  info = learners.learner_facts(
    name="learned_orf",
    source="Stewart 1980; Mhammedi et al. 2017 (1612.00188)",
    summary="orthogonal rows from learnable reflections, learnable norms",
    good_for="all components",
    constraint="any num_features, head_dim >= 2",
    cost="H - 1 reflections of H x H per block, one after another, every step",
    variance="at the start as orf: trig 0.38, pos 0.76 at scale 0.2, H=32",
    redrawable=False,
  )

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    if head_dim < 2:
      raise ValueError(
        "weight matrix 'learned_orf' needs head_dim >= 2, got head_dim="
        f"{head_dim}: a line has no directions to learn; use 'learned_radial'."
      )

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    direction_rng, norm_rng = jax.random.split(rng)
    num_blocks = -(-num_rows // head_dim)
    norms = pieces.chi_norms(norm_rng, num_rows, head_dim)
    return {
      "v": haar_reflections(direction_rng, num_blocks, head_dim),
      "rho": learners.inverse_softplus(jnp.maximum(norms, learners.MIN_NORM)),
    }

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    num_blocks = -(-num_rows // head_dim)
    return {"signs": pieces.random_signs(rng, (num_blocks, head_dim))}

  @override
  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    norms = jax.nn.softplus(params["rho"])
    signs = projection["signs"].astype(jnp.float32)
    directions = reflections(params["v"]) * signs[:, None, :]
    stacked = directions.reshape(-1, signs.shape[-1])[: norms.shape[0]]
    return WeightSample(norms[:, None] * stacked)
