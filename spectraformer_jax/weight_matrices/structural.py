"""Structured rows from few Gaussian numbers: circulant blocks and P-model."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices import base, pieces

SHARED_OR_CHI = ("shared", "chi")
KINDS = ("toeplitz", "hankel", "circulant", "ldr")
# Kind "ldr": default displacement rank; nonzero entries of a sparse factor.
RANK = 4
NONZEROS = 5


def circulant(vector: Array) -> Array:
  """Makes circulant matrices: entry (i, j) is vector[(i - j) mod n].

  Args:
    vector: ``[..., n]``, the first column.

  Returns:
    ``[..., n, n]``.

  Example:
    >>> import jax.numpy as jnp
    >>> circulant(jnp.array([0, 1, 2])).tolist()
    [[0, 2, 1], [1, 0, 2], [2, 1, 0]]
  """
  index = np.arange(vector.shape[-1])
  return vector[..., (index[:, None] - index[None, :]) % vector.shape[-1]]


@base.WEIGHT_MATRICES.register("scrf")
@dataclasses.dataclass(frozen=True)
class SCRF(base.GaussianRows):
  r"""Signed circulant random features.

  .. math::
    W_b = \mathrm{circ}(g)\, \mathrm{diag}(b), \quad g \sim N(0, I_H)

  with random signs b of the columns (signs of rows would not change a cosine).
  Each row alone is N(0, I). All rows of a block have the norm of g, which
  raises the variance; in "scrf_chi" each row has its own norm.

  Args:
    norms: "shared": rows as they are; "chi": independent norms of Gaussian
      rows, which lower the error to that of independent rows.

  Raises:
    ValueError: unknown `norms`.

  References:
    Feng, Hu and Liao, Random Feature Mapping with Signed Circulant Matrix
    Projection, 2015.

  Example:
    >>> import jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "scrf", num_features=12)
    >>> w = fm.init(jax.random.key(0), head_dim=6).projection["rows"]["w"][0]
    >>> bool(jnp.allclose(abs(w[1, 1:]), abs(w[0, :-1])))
    True
  """

  norms: str = "shared"

  facts = base.WeightMatrixInfo(
    name="scrf",
    group="structural",
    marginals="exact",
    source="Feng, Hu and Liao 2015",
    summary="signed circulant blocks",
    good_for="the fewest random numbers; use scrf_chi for the least variance",
    cost="2 M draws",
    variance="trig 1.6, pos 1.2 at scale 0.2; trig 1.9 at 0.1; H=32",
  )

  def __post_init__(self) -> None:
    check_choice("norms", self.norms, SHARED_OR_CHI)

  def _info(self) -> base.WeightMatrixInfo:
    if self.norms == "shared":
      return self.facts
    return dataclasses.replace(
      self.facts,
      name="scrf_chi",
      good_for="few random numbers for the directions of rows",
      summary="signed circulant blocks, each row with its own norm",
      cost="2 M draws, and M H for the norms",
      variance="trig 0.98, pos 0.98 at scale 0.2, H=32",
    )

  info = base.info_from_options(_info)

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    block_rng, norm_rng = jax.random.split(rng)

    def draw_block(rng: Array, num_blocks: int) -> Array:
      gaussian_rng, sign_rng = jax.random.split(rng)
      shape = (num_blocks, head_dim)
      gaussian = pieces.normal(gaussian_rng, shape)
      signs = pieces.random_signs(sign_rng, shape)
      return circulant(gaussian) * signs[:, None, :]

    rows = base.draw_blocks(draw_block, block_rng, num_rows, head_dim)
    return pieces.chi_rows(norm_rng, rows) if self.norms == "chi" else rows


@base.WEIGHT_MATRICES.register("scrf_chi")
def scrf_chi() -> SCRF:
  """Signed circulant rows, each with its own norm: `SCRF` with norms="chi".

  Each row alone is exactly N(0, I). The error is that of independent rows;
  that of "scrf" is 1.6 to 1.9 times as large.

  References:
    Independent norms on Feng, Hu and Liao, Random Feature Mapping with Signed
    Circulant Matrix Projection, 2015.

  Example:
    >>> scrf_chi() == SCRF(norms="chi")
    True
  """
  return SCRF(norms="chi")


def toeplitz(entries: Array, num_rows: int, dim: int) -> Array:
  """Makes a Toeplitz matrix ``[M, H]``: entry (m, j) is entries[m - j + H - 1].

  Args:
    entries: ``[M + H - 1]``, all the different entries.
    num_rows: M.
    dim: H.

  Example:
    >>> toeplitz(jnp.arange(4), 2, 3).tolist()
    [[2, 1, 0], [3, 2, 1]]
  """
  return hankel(entries, num_rows, dim)[:, ::-1]


def hankel(entries: Array, num_rows: int, dim: int) -> Array:
  """Makes a Hankel matrix ``[M, H]``: entry (m, j) is entries[m + j].

  Args:
    entries: ``[M + H - 1]``, all the different entries.
    num_rows: M.
    dim: H.

  Example:
    >>> hankel(jnp.arange(4), 2, 3).tolist()
    [[0, 1, 2], [1, 2, 3]]
  """
  return entries[np.arange(num_rows)[:, None] + np.arange(dim)[None, :]]


def skew_circulant(vector: Array) -> Array:
  """Makes matrices as `circulant` does, with opposite signs above the diagonal.

  Args:
    vector: ``[..., n]``, the first column.

  Example:
    >>> skew_circulant(jnp.array([0, 1, 2])).tolist()
    [[0, -2, -1], [1, 0, -2], [2, 1, 0]]
  """
  n = vector.shape[-1]
  index = np.arange(n)
  both = jnp.concatenate([vector, -vector], axis=-1)
  return both[..., (index[:, None] - index[None, :]) % (2 * n)]


def low_displacement(rng: Array, num_blocks: int, dim: int, rank: int) -> Array:
  r"""Draws blocks :math:`\sum_i \mathrm{circ}(g_i)\, \mathrm{skew}(h_i)`.

  Each g is Gaussian; skew is `skew_circulant`. Each h is zero except for 5
  entries (n, if that is less) at random places, of equal size and random signs.

  Args:
    rng: PRNG key.
    num_blocks: number of blocks.
    dim: n.
    rank: number of terms of the sum.

  Returns:
    ``[num_blocks, n, n]`` float32; the covariance of a row is I on average over
    h.

  Example:
    >>> low_displacement(jax.random.key(0), 3, 8, 2).shape
    (3, 8, 8)
  """
  gaussian_rng, place_rng, sign_rng = jax.random.split(rng, 3)
  shape = (num_blocks, rank, dim)
  nonzeros = min(NONZEROS, dim)
  scores = jax.random.uniform(place_rng, shape, dtype=jnp.float32)
  places = jax.lax.top_k(scores, nonzeros)[1]
  mask = jnp.sum(jax.nn.one_hot(places, dim, dtype=jnp.float32), axis=-2)
  signs = pieces.random_signs(sign_rng, shape)
  sparse = mask * signs / np.float32(np.sqrt(nonzeros * rank))
  left = circulant(pieces.normal(gaussian_rng, shape))
  terms = jnp.matmul(left, skew_circulant(sparse), precision="highest")
  return jnp.sum(terms, axis=1)


@base.WEIGHT_MATRICES.register("pmodel")
@dataclasses.dataclass(frozen=True)
class PModel(base.GaussianRows):
  r"""P-model: structured rows from one short vector g of Gaussian numbers.

  .. math::
    W = A\, D_1 H D_0, \qquad A_m = g^\top P_m, \quad g \sim N(0, I)

  Row m of A is g times a matrix :math:`P_m` that sets its structure: A is
  Toeplitz or Hankel (M + head_dim - 1 Gaussian numbers for the whole matrix),
  circulant (head_dim per block) or of low displacement rank (``rank * n`` per
  block; n: the least power of two that is at least head_dim). The factor
  :math:`D_1 H D_0` (Hadamard matrix and random signs) mixes the coordinates of
  an input, so that no input is special; if head_dim is not a power of two, this
  factor is :math:`D_0` alone, except for "ldr". Each row alone is exactly
  N(0, I), but for "ldr" only on average over the sparse factor (bias 0.005).
  Norms of rows are equal or nearly equal, which raises the variance.

  Args:
    kind: "toeplitz", "hankel", "circulant" or "ldr".
    norms: "shared": rows as they are; "chi": independent norms of Gaussian
      rows, which lower the error to that of independent rows.
    rank: displacement rank of "ldr" (4 if None; with a larger rank rows are
      closer to independent); None for the other kinds.

  Raises:
    ValueError: unknown `kind` or `norms`, a `rank` that is not a positive
      integer, or a `rank` for another kind than "ldr".

  References:
    Choromanski and Sindhwani, Recycling Randomness with Structure for Sublinear
    Time Kernel Expansions, 2016 (1605.09049).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "pmodel_toeplitz", num_features=12)
    >>> w = fm.init(jax.random.key(0), head_dim=6).projection["rows"]["w"][0]
    >>> bool(jnp.allclose(abs(w[1, 1:]), abs(w[0, :-1])))
    True
  """

  kind: str = "toeplitz"
  norms: str = "shared"
  rank: int | None = None

  name: ClassVar[str] = "pmodel"

  def __post_init__(self) -> None:
    check_choice("kind", self.kind, KINDS)
    check_choice("norms", self.norms, SHARED_OR_CHI)
    if self.rank is None:
      return
    if self.kind != "ldr":
      raise ValueError(
        f"rank={self.rank!r} is for kind='ldr'; kind={self.kind!r} takes None."
      )
    check_positive_int("rank", self.rank)

  def _info(self) -> base.WeightMatrixInfo:
    chi, ldr = self.norms == "chi", self.kind == "ldr"
    constraint = base.WeightMatrixInfo.constraint
    cost = "M draws" if self.kind == "circulant" else "M + H draws"
    if ldr:
      constraint += " (padded to a power of two)"
      cost = "rank products of n x n matrices per block"
    shape = "low-displacement-rank" if ldr else self.kind
    return base.WeightMatrixInfo(
      name=self.name,
      group="structural",
      marginals="approximate" if ldr else "exact",
      source="Choromanski and Sindhwani 2016 (1605.09049)",
      summary=f"{shape} rows from few Gaussian numbers, inputs mixed",
      good_for="few random numbers; norms='chi' for the least variance",
      constraint=constraint,
      cost=cost + (", and M H for the norms" if chi else ""),
      variance="about 1"
      if chi
      else "trig 1.4 to 1.6, pos 1.2 to 1.4 at scale 0.2, H=32",
    )

  info = base.info_from_options(_info)

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    rows_rng, mix_rng, norm_rng = jax.random.split(rng, 3)
    if self.kind in ("toeplitz", "hankel"):
      # One matrix for all rows.
      make_matrix = toeplitz if self.kind == "toeplitz" else hankel
      entries = pieces.normal(rows_rng, (num_rows + head_dim - 1,))
      matrix = make_matrix(entries, num_rows, head_dim)
      rows = mix_inputs(mix_rng, matrix[None])[0]
    else:
      n = pieces.next_power_of_two(head_dim) if self.kind == "ldr" else head_dim

      def draw_block(rng: Array, num_blocks: int) -> Array:
        if self.kind == "ldr":
          blocks = low_displacement(rng, num_blocks, n, self.rank or RANK)
        else:
          blocks = circulant(pieces.normal(rng, (num_blocks, n)))
        return mix_inputs(mix_rng, blocks)

      rows = base.draw_blocks(draw_block, rows_rng, num_rows, n)[:, :head_dim]
    return pieces.chi_rows(norm_rng, rows) if self.norms == "chi" else rows


PModelToeplitz = base.WEIGHT_MATRICES.alias(
  "pmodel_toeplitz", "PModelToeplitz", PModel, kind="toeplitz", rank=None
)
PModelHankel = base.WEIGHT_MATRICES.alias(
  "pmodel_hankel", "PModelHankel", PModel, kind="hankel", rank=None
)
PModelCirculant = base.WEIGHT_MATRICES.alias(
  "pmodel_circulant", "PModelCirculant", PModel, kind="circulant", rank=None
)
PModelLDR = base.WEIGHT_MATRICES.alias(
  "pmodel_ldr", "PModelLDR", PModel, kind="ldr"
)


def mix_inputs(rng: Array, blocks: Array) -> Array:
  """Multiplies blocks ``[L, rows, n]`` from the right by ``D1 H D0``.

  D0 and D1 are diagonals of random signs, H is the Hadamard matrix divided by
  sqrt(n). If n is not a power of two, the factor is D0 alone.

  Example:
    >>> mixed = mix_inputs(jax.random.key(0), jnp.eye(4)[None])[0]
    >>> abs(mixed).round(3)[0].tolist()
    [0.5, 0.5, 0.5, 0.5]
  """
  num_blocks, _, n = blocks.shape
  signs = pieces.random_signs(rng, (2, num_blocks, 1, n))
  if pieces.next_power_of_two(n) == n:
    table = jnp.asarray(pieces.hadamard(n))
    blocks = jnp.matmul(blocks * signs[1], table, precision="highest")
  return blocks * signs[0]
