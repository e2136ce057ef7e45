"""Rows that are signed shifts of one Gaussian vector: circulant blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
  draw_blocks,
)
from spectraformer_jax.weight_matrices.building_blocks import chi_rows

ROW_NORMS = ("shared", "chi")


def circulant(vector: Array) -> Array:
  """Circulant matrices ``[..., n, n]``: entry (i, j) is vector[(i - j) mod n].

  Args:
    vector: ``[..., n]``, the first column.

  Example:
    >>> circulant(jnp.array([0, 1, 2])).tolist()
    [[0, 2, 1], [1, 0, 2], [2, 1, 0]]
  """
  index = np.arange(vector.shape[-1])
  return vector[..., (index[:, None] - index[None, :]) % vector.shape[-1]]


@WEIGHT_MATRICES.register("scrf")
@dataclasses.dataclass(frozen=True)
class SCRF(WeightMatrix):
  r"""Signed circulant random features.

  .. math::
    W_b = \mathrm{circ}(g)\, \mathrm{diag}(b), \quad g \sim N(0, I_H)

  with random signs b of the columns (signs of rows would be invisible to a
  cosine). Each row alone is N(0, I). All rows of a block share the norm of g,
  which costs variance: "scrf_chi" gives each its own.

  Args:
    norms: "shared": rows as they are; "chi": each row has a fresh norm of a
      Gaussian row, which brings the error down to that of independent rows.

  Raises:
    ValueError: unknown `norms`.

  References:
    Feng, Hu and Liao, Random Feature Mapping with Signed Circulant Matrix
    Projection, 2015.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "scrf", num_features=12)
    >>> w = fm.init(jax.random.key(0), head_dim=6).projection["rows"]["w"][0]
    >>> bool(jnp.allclose(abs(w[1, 1:]), abs(w[0, :-1])))
    True
  """

  norms: str = "shared"

  def __post_init__(self):
    if self.norms not in ROW_NORMS:
      raise ValueError(f"norms must be one of {ROW_NORMS}, got {self.norms!r}.")

  @property
  def info(self):
    """Facts; name and variance depend on `norms`."""
    chi = self.norms == "chi"
    return WeightMatrixInfo(
      name="scrf_chi" if chi else "scrf",
      group="structural",
      marginals="exact",
      source="Feng, Hu and Liao 2015",
      summary="signed circulant blocks"
      + (", each row with its own norm" if chi else ""),
      good_for="the fewest random numbers; use scrf_chi for the least variance",
      cost="2 M draws" + (", and M H for the norms" if chi else ""),
      variance="trig 0.98, pos 0.98 at scale 0.2, H=32"
      if chi
      else "trig 1.6, pos 1.2 at scale 0.2; trig 1.9 at 0.1; H=32",
    )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    block_rng, norm_rng = jax.random.split(rng)

    def draw_block(rng, num_blocks):
      gaussian_rng, sign_rng = jax.random.split(rng)
      shape = (num_blocks, head_dim)
      gaussian = jax.random.normal(gaussian_rng, shape, dtype=jnp.float32)
      signs = jax.random.rademacher(sign_rng, shape, jnp.float32)
      return circulant(gaussian) * signs[:, None, :]

    rows = draw_blocks(draw_block, block_rng, num_rows, head_dim)
    return {"w": chi_rows(norm_rng, rows) if self.norms == "chi" else rows}


@WEIGHT_MATRICES.register("scrf_chi")
def scrf_chi() -> SCRF:
  """Signed circulant rows, each with its own norm: `SCRF` with norms="chi".

  Still exactly N(0, I) row by row, with the error of independent rows where
  "scrf" has 1.6 to 1.9 times as much.

  References:
    Fresh norms on Feng, Hu and Liao, Random Feature Mapping with Signed
    Circulant Matrix Projection, 2015.

  Example:
    >>> scrf_chi() == SCRF(norms="chi")
    True
  """
  return SCRF(norms="chi")
