"""What a weight matrix is: a recipe from noise to rows."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from spectraformer_jax.registry import Registry
from spectraformer_jax.typing import Array, Params, Projection, WeightSample
from spectraformer_jax.weight_matrices.row_laws import RowLaw

WEIGHT_MATRICES = Registry("weight matrix")


@dataclasses.dataclass(frozen=True)
class WeightMatrixInfo:
  """Static facts about a weight matrix; tables and tests are made from them.

  Attributes:
    name: registry name.
    group: place in the taxonomy: "monte carlo", "geometric", "structural",
      "unit cube", "quadrature", "learner" or "none".
    marginals: "exact" (each row alone follows the row law, so every mean over
      rows is unbiased), "approximate" (first two moments only: biased), or
      "weighted" (unbiased with its row weights).
    source: paper and equation.
    summary: one line: what it is.
    good_for: which components it serves, and when.
    row_laws: names of the row laws it can realise.
    constraint: in words, what num_features and head_dim must satisfy.
    cost: of one draw.
    variance: known variance against iid rows, or "".
    learnable: has trainable parameters.
    redrawable: a new projection can be drawn inside jit.
    weighted: rows have unequal weights.
    signed: weights can be negative; the estimate of a positive kernel can then
      be negative, too.
    trig_only: heavy tails: a positive map has infinite variance.
    antithetic: the second half of the rows is the negative of the first.
  """

  name: str
  group: str
  marginals: Literal["exact", "approximate", "weighted"]
  source: str
  summary: str
  good_for: str = ""
  row_laws: tuple[str, ...] = ("gaussian",)
  constraint: str = "any num_features, any head_dim"
  cost: str = ""
  variance: str = ""
  learnable: bool = False
  redrawable: bool = True
  weighted: bool = False
  signed: bool = False
  trig_only: bool = False
  antithetic: bool = False


@dataclasses.dataclass(frozen=True)
class WeightMatrix:
  """Base of all weight matrices W.

  A subclass is a frozen dataclass whose fields are its options, with a class
  attribute `info` and, at least, `draw`. An approximator draws its rows. A
  learner draws noise, makes parameters in `init`, and turns both into rows in
  `rows`. All methods are pure and see one head; heads are added by `vmap`.
  Drawn leaves are plain dictionaries of arrays, so that they are saved and
  restored like any other array. Tables that depend on sizes alone are numpy
  under `functools.lru_cache`.
  """

  info: ClassVar[WeightMatrixInfo]

  @property
  def needs_stats(self) -> bool:
    """Whether `rows` cannot work without a context from `calibrate`."""
    return False

  def check(self, num_rows: int, head_dim: int) -> None:
    """Raises ValueError, with the constraint, for sizes it cannot make."""

  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    """Learnable parameters, float32; ``{}`` for approximators."""
    del rng, num_rows, head_dim
    return {}

  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    """Random leaves in a flat dictionary, float32 or integers below 2**24.

    Leaves are stored in the dtype that `FeatureMap.init` is asked for, except
    "log_weight" and integers, which are stored as float32: it holds them
    exactly, and a tree of floats has a gradient.

    Leaf "w" is ``[M, H]``: the rows of an approximator (beside it, where they
    are not equal, "log_weight" and "sign" ``[M]``), the noise of a learner.
    Only a matrix that is not redrawable may lack it.
    """
    raise NotImplementedError

  def calibrate(
    self, params: Params, key: Array, key_mask: Array | None
  ) -> Any:
    """Context of one sequence for rows that depend on it; () for none.

    Args:
      params: from `init`.
      key: ``[S, H]`` float32, scaled.
      key_mask: ``[S]`` bool or None.
    """
    del params, key, key_mask
    return ()

  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    """The rows, from parameters, drawn leaves and context."""
    del params, context
    return WeightSample(
      projection["w"], projection.get("log_weight"), projection.get("sign")
    )


def draw_blocks(
  draw_block: Callable[[Array, int], Array],
  rng: Array,
  num_rows: int,
  block_size: int,
) -> Array:
  """Stacks independent blocks of rows and keeps the first `num_rows`.

  Dropping rows leaves the law of the others as it was; enlarging a block to
  `num_rows` would change its scale.

  Args:
    draw_block: ``(rng, num_blocks) -> [num_blocks, block_size, H]``.
    rng: PRNG key.
    num_rows: M.
    block_size: rows in one block.

  Returns:
    ``[M, H]``.
  """
  num_blocks = -(-num_rows // block_size)
  blocks = draw_block(rng, num_blocks)
  return jnp.reshape(blocks, (num_blocks * block_size, -1))[:num_rows]
