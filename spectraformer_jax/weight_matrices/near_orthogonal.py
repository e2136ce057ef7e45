"""More nearly orthogonal rows than dimensions: points that repel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.building_blocks import (
  check_norms,
  haar,
  row_norms,
)
from spectraformer_jax.weight_matrices.geometric import orthogonal_rows

DELTA = 0.1
STEPS = 400


@functools.lru_cache(maxsize=32)
def repelling_directions(num_rows: int, dim: int) -> np.ndarray:
  r"""Unit vectors that minimise :math:`\sum 1 / (\delta + |v_i - v_j|^2)`.

  Projected gradient descent on the host from a fixed start, once per size. A
  step subtracts from each vector the mean of the others, weighted by how fast
  their terms grow.

  Args:
    num_rows: M.
    dim: H.

  Returns:
    ``[M, H]`` float32, numpy, read-only.

  Example:
    >>> v = repelling_directions(3, 2)  # an equilateral triangle
    >>> round(float(v[0] @ v[1]), 3)
    -0.5
  """
  start = np.random.default_rng(0).standard_normal((num_rows, dim))
  v = start.astype(np.float32)
  v /= np.linalg.norm(v, axis=1, keepdims=True)
  for _ in range(STEPS):
    weight = np.square(1.0 / (DELTA + 2.0 - 2.0 * (v @ v.T)))
    np.fill_diagonal(weight, 0.0)
    v = v - weight @ v / weight.sum(axis=1, keepdims=True)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
  v.setflags(write=False)
  return v


@WEIGHT_MATRICES.register("nomc")
@dataclasses.dataclass(frozen=True)
class NOMC(WeightMatrix):
  r"""Near-orthogonal Monte Carlo: M > H directions that repel one another.

  .. math::
    W = \mathrm{diag}(r)\, V U, \quad U \sim \mathrm{Haar}(H), \quad
    r_m \sim \chi_H, \quad
    V = \arg\min \sum_{i \ne j} \frac{1}{\delta + |v_i - v_j|^2}

  V is found once per size on the host (a second at M = 256, H = 64) and cached.
  Each row alone is N(0, I). For M <= H rows are those of `ORF`. Points repel
  where lines should, so trigonometric maps do better with `ORF`.

  Args:
    norms: "chi" (exact marginals) or "sqrt_d": all norms sqrt(H), with the mean
      given at "orf_sqrtd".

  Raises:
    ValueError: unknown `norms`.

  References:
    Lin et al., Demystifying Orthogonal Monte Carlo and Beyond, 2020
    (2005.13590).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "nomc", num_features=12)
    >>> fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"].shape
    (1, 12, 4)
  """

  norms: str = "chi"

  def __post_init__(self):
    check_norms(self.norms)

  @property
  def info(self):
    """Facts; marginals depend on `norms`."""
    return WeightMatrixInfo(
      name="nomc",
      group="geometric",
      marginals="exact" if self.norms == "chi" else "approximate",
      source="Lin et al. 2020 (2005.13590)",
      summary="directions that repel one another, randomly rotated",
      good_for="positive maps with M > H",
      constraint="any num_features (orf up to head_dim), any head_dim",
      cost="one QR factorisation of H x H; O(M^2 H) on the host, once",
      variance="trig 0.43, pos 0.48 at scale 0.2; pos 0.09 at 0.1; H=32, M=128",
    )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    if num_rows <= head_dim:
      return {"w": orthogonal_rows(rng, self.norms, num_rows, head_dim)}
    rotation_rng, norm_rng = jax.random.split(rng)
    rotation = haar(rotation_rng, 1, head_dim)[0]
    table = jnp.asarray(repelling_directions(num_rows, head_dim))
    directions = jnp.matmul(table, rotation, precision="highest")
    norms = row_norms(norm_rng, self.norms, num_rows, head_dim)
    return {"w": norms[:, None] * directions}
