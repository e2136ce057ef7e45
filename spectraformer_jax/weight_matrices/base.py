"""Base classes of weight matrices, their registry and the facts about each."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.registry import Registry, info_from_options
from spectraformer_jax.typing import Array, Params, Projection, WeightSample
from spectraformer_jax.weight_matrices.pieces import check_norms
from spectraformer_jax.weight_matrices.row_laws import RowLaw

WEIGHT_MATRICES = Registry("weight matrix")


@dataclasses.dataclass(frozen=True)
class WeightMatrixInfo:
  """Static facts about a weight matrix, for its users, the docs and the tests.

  Attributes:
    name: registry name.
    group: place in the taxonomy: "monte carlo", "geometric", "structural",
      "unit cube", "quadrature", "learner" or "none".
    marginals: law of a single row. "exact": the row law that the component
      requires, so that every mean over rows is unbiased. "weighted": another
      law; the row weights make means unbiased. "approximate": only the first
      two moments agree with the row law, so means are biased.
    source: paper and equation.
    summary: what the rows are, in one line.
    good_for: which components it suits, and when.
    row_laws: names of the row laws that it can draw.
    constraint: which num_features and head_dim it accepts, in words.
    cost: cost of one draw.
    variance: mean squared error of kernel estimates, divided by the variance of
      as many independent rows; "" if unknown. "trig" and "pos": for TrigRF and
      PosRF. "scale s": for x and y drawn from N(0, s^2 I).
    learnable: it has trainable parameters.
    redrawable: a new projection can replace the old one, also in `jax.jit`.
    weighted: rows have unequal weights.
    signed: row weights can be negative, and so can the estimate of a positive
      kernel.
    trig_only: its rows have heavy tails, for which a positive component has
      infinite variance.
    antithetic: the second half of the rows is the negative of the first half.
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

  A subclass is a frozen dataclass whose fields are its options. It sets `info`
  and overrides `draw`. An approximator draws its rows. A learner draws noise,
  creates parameters in `init`, and computes rows from both in `rows`.

  All methods are pure and see one head; the caller adds heads by `jax.vmap`. In
  shapes M is `num_rows` and H is `head_dim`. A table that depends on sizes
  alone is a NumPy array, cached by `functools.lru_cache`: a JAX array made
  inside a trace must not outlive the trace, so it must not be cached.

  Attributes:
    info: facts about the matrix. If they depend on the options, make it by
      `registry.info_from_options`.
  """

  info: ClassVar[WeightMatrixInfo]

  @property
  def needs_stats(self) -> bool:
    """Whether `rows` needs a context from `calibrate`."""
    return False

  def check(self, num_rows: int, head_dim: int) -> None:
    """Raises ValueError, naming the constraint, for unsupported sizes."""

  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    """Returns new learnable parameters, float32; ``{}`` if there are none."""
    return {}

  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    """Draws the random leaves: a flat dictionary of float32 or integer arrays.

    Leaf "w" ``[M, H]`` holds the rows of an approximator or the noise of a
    learner. Rows of unequal weight add the leaf "log_weight" ``[M]``; if some
    weights are negative, also "sign" ``[M]``. Only a matrix that is not
    redrawable may lack "w": a redraw reads H from its shape.

    `FeatureMap.init` stores leaves in the dtype that its caller chooses, except
    "log_weight" and integers, which it stores as float32: `jax.grad` refuses
    integer leaves. Integers must be below 2**24, so that float32 holds them
    exactly.
    """
    raise NotImplementedError

  def calibrate(
    self, params: Params, key: Array, key_mask: Array | None
  ) -> Any:
    """Returns what `rows` needs to know about one sequence: its context.

    Args:
      params: from `init`.
      key: ``[S, H]`` float32, scaled.
      key_mask: ``[S]`` bool, True where visible; None if all are.

    Returns:
      The last argument of `rows`; ``()`` if rows do not depend on the sequence.
    """
    return ()

  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    """Returns the rows and their weights.

    Args:
      params: from `init`.
      projection: from `draw`.
      context: from `calibrate`.
    """
    return WeightSample(
      projection["w"], projection.get("log_weight"), projection.get("sign")
    )


@dataclasses.dataclass(frozen=True)
class GaussianRows(WeightMatrix):
  """Base of weight matrices with Gaussian rows of equal weight.

  A subclass overrides `draw_rows` instead of `draw`.
  """

  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    """Draws the rows ``[M, H]`` float32."""
    raise NotImplementedError

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    return {"w": self.draw_rows(rng, num_rows, head_dim)}


@dataclasses.dataclass(frozen=True)
class NormedRows(GaussianRows):
  """Base of matrices whose rows have either chi norms or equal norms.

  Args:
    norms: "chi" (those of independent Gaussian rows), or "sqrt_d" (all norms
      are sqrt(H): less variance, and a bias that M does not reduce; see
      "orf_sqrtd").

  Attributes:
    facts: `info` for norms="chi".

  Raises:
    ValueError: unknown `norms`.
  """

  facts: ClassVar[WeightMatrixInfo]

  norms: str = "chi"

  def __post_init__(self) -> None:
    check_norms(self.norms)

  def _info(self) -> WeightMatrixInfo:
    if self.norms == "chi":
      return self.facts
    return dataclasses.replace(self.facts, marginals="approximate")

  info = info_from_options(_info)


def draw_blocks(
  draw_block: Callable[[Array, int], Array],
  rng: Array,
  num_rows: int,
  block_size: int,
) -> Array:
  """Stacks independent blocks of rows and keeps the first `num_rows` rows.

  The last block is drawn whole and then cut, so that its remaining rows keep
  their law; a block of another size would have another scale.

  Args:
    draw_block: ``(rng, num_blocks) -> [num_blocks, block_size, H]``.
    rng: PRNG key.
    num_rows: M.
    block_size: rows of one block.

  Returns:
    ``[M, H]``.
  """
  num_blocks = -(-num_rows // block_size)
  blocks = draw_block(rng, num_blocks)
  return jnp.reshape(blocks, (num_blocks * block_size, -1))[:num_rows]
