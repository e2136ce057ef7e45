"""Rows and row weights that are parameters themselves."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.typing import Array, Params, Projection, WeightSample
from spectraformer_jax.weight_matrices import base, learners
from spectraformer_jax.weight_matrices.row_laws import RowLaw, get_row_law


@base.WEIGHT_MATRICES.register("free")
@dataclasses.dataclass(frozen=True)
class Free(learners.Learner):
  r"""Free rows: each entry of W and each row weight is a parameter.

  .. math:: w_m \in \mathbb{R}^H, \quad \log (M a_m) \in \mathbb{R}

  They start as the rows of `base`, times `scale`, with equal weights. With
  scale=1 every component starts unbiased; other scales start with another
  kernel. Queries and keys share the rows; component "learned_exp" has other
  ones for each side. Nothing is drawn but the start, so there is no redraw.

  Args:
    scale: size of the first rows relative to Gaussian ones.

  Raises:
    ValueError: a scale that is not positive and finite.

  References:
    None: a weight matrix without structure, trained like any linear layer.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "free", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> {name: leaf.shape for name, leaf in v.params["rows"].items()}
    {'log_weight': (1, 16), 'w': (1, 16, 4)}
  """

  scale: float = 1.0

  facts = learners.learner_facts(
    name="free",
    source="-",
    summary="learnable entries and row weights, without structure",
    good_for="fits to data where memory counts; any component",
    cost="at the start that of the base, then nothing",
    variance="at the start that of the base, then none",
    redrawable=False,
    weighted=True,
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    if not (self.scale > 0.0 and math.isfinite(self.scale)):
      raise ValueError(
        f"scale must be positive and finite, got {self.scale!r}."
      )

  def _info(self) -> base.WeightMatrixInfo:
    info = super()._info()
    if self.scale == 1.0:
      return info
    return dataclasses.replace(info, marginals="approximate")

  info = base.info_from_options(_info)

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    law = get_row_law("gaussian")
    drawn = self.base_matrix.draw(rng, num_rows, head_dim, law)
    rows = self.base_matrix.rows({}, drawn).w
    return {
      "w": self.scale * rows,
      "log_weight": jnp.zeros((num_rows,), jnp.float32),
    }

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    return {}

  @override
  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    return WeightSample(params["w"], params["log_weight"])
