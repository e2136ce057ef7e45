"""Rows stratified column by column: a Latin hypercube."""

import dataclasses

import jax

from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.building_blocks import (
  stratified_uniforms,
)
from spectraformer_jax.weight_matrices.row_laws import ENTRY_LAWS


@WEIGHT_MATRICES.register("lhs")
@dataclasses.dataclass(frozen=True)
class LHS(WeightMatrix):
  r"""Latin hypercube sampling: every column stratified, independently.

  .. math::
    W_{mj} = F^{-1}\big((\pi_j(m) + U_{mj}) / M\big), \quad
    U_{mj} \sim U(0, 1)

  with one random permutation :math:`\pi_j` for each column: one row in each
  1/M of every coordinate, whatever M and H are. Each row has exactly the
  component's law (any law), so every component stays unbiased. It removes the
  part of the variance that is a sum over coordinates: most of it for positive
  maps at small distances, little for trigonometric ones.

  References:
    McKay, Beckman and Conover, A Comparison of Three Methods for Selecting
    Values of Input Variables, 1979, section 2.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "lhs", num_features=6)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> (w > 0).sum(axis=0).tolist()
    [3, 3, 3, 3]
  """

  info = WeightMatrixInfo(
    name="lhs",
    group="unit cube",
    marginals="exact",
    source="McKay, Beckman and Conover 1979, section 2",
    summary="one row in each 1/M of every coordinate",
    good_for="positive maps at small distances; any row law, any M",
    row_laws=ENTRY_LAWS,
    cost="H sorts of M numbers",
    variance="trig 0.95, pos 0.28 (at 0.1) at scale 0.2, H=32",
  )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    columns = jax.random.split(rng, head_dim)
    uniforms = jax.vmap(
      lambda rng: stratified_uniforms(rng, num_rows), out_axes=1
    )(columns)
    return {"w": law.from_uniform(uniforms)}
