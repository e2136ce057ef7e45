"""The P-model: all rows are linear in one budget of Gaussian numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
  draw_blocks,
)
from spectraformer_jax.weight_matrices.building_blocks import (
  chi_rows,
  hadamard,
  next_power_of_two,
)
from spectraformer_jax.weight_matrices.structural import ROW_NORMS, circulant

KINDS = ("toeplitz", "hankel", "circulant", "ldr")
RANK = 4
NONZEROS = 5


def toeplitz(budget: Array, num_rows: int, dim: int) -> Array:
  """Toeplitz matrix ``[M, H]``: entry (m, j) is budget[m - j + H - 1].

  Args:
    budget: ``[M + H - 1]``.
    num_rows: M.
    dim: H.

  Example:
    >>> toeplitz(jnp.arange(4), 2, 3).tolist()
    [[2, 1, 0], [3, 2, 1]]
  """
  return hankel(budget, num_rows, dim)[:, ::-1]


def hankel(budget: Array, num_rows: int, dim: int) -> Array:
  """Hankel matrix ``[M, H]``: entry (m, j) is budget[m + j].

  Args:
    budget: ``[M + H - 1]``.
    num_rows: M.
    dim: H.

  Example:
    >>> hankel(jnp.arange(4), 2, 3).tolist()
    [[0, 1, 2], [1, 2, 3]]
  """
  return budget[np.arange(num_rows)[:, None] + np.arange(dim)[None, :]]


def skew_circulant(vector: Array) -> Array:
  """Like `circulant`, with opposite signs above the diagonal.

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
  r"""Blocks :math:`\sum_i \mathrm{circ}(g_i)\, \mathrm{skew}(h_i)`.

  Each h has at most 5 entries, of random signs, at random places.

  Args:
    rng: PRNG key.
    num_blocks: how many.
    dim: n.
    rank: terms of the sum.

  Returns:
    ``[num_blocks, n, n]`` float32, rows of mean covariance I.

  Example:
    >>> low_displacement(jax.random.key(0), 3, 8, 2).shape
    (3, 8, 8)
  """
  gaussian_rng, place_rng, sign_rng = jax.random.split(rng, 3)
  shape = (num_blocks, rank, dim)
  nonzeros = min(NONZEROS, dim)
  order = jax.random.uniform(place_rng, shape, dtype=jnp.float32)
  places = jax.lax.top_k(order, nonzeros)[1]
  mask = jnp.sum(jax.nn.one_hot(places, dim, dtype=jnp.float32), axis=-2)
  signs = jax.random.rademacher(sign_rng, shape, jnp.float32)
  sparse = mask * signs / np.float32(np.sqrt(nonzeros * rank))
  left = circulant(jax.random.normal(gaussian_rng, shape, dtype=jnp.float32))
  terms = jnp.matmul(left, skew_circulant(sparse), precision="highest")
  return jnp.sum(terms, axis=1)


@WEIGHT_MATRICES.register("pmodel")
@dataclasses.dataclass(frozen=True)
class PModel(WeightMatrix):
  r"""P-model: structured rows from one budget of Gaussian numbers.

  .. math::
    W = A\, D_1 H D_0, \qquad A_m = g^\top P_m, \quad g \sim N(0, I)

  A is Toeplitz, Hankel (M + H - 1 Gaussian numbers for the whole matrix),
  circulant (H per block) or of low displacement rank (rank n per block);
  :math:`D_1 H D_0` (Hadamard and random signs) mixes the inputs, so that no
  input is special; where head_dim is not a power of two it is :math:`D_0`
  alone. Each row alone is exactly N(0, I), but for "ldr", where it is so on
  average over the sparse factor (bias 0.005). Rows share their norms or nearly
  so, which costs variance.

  Args:
    kind: "toeplitz", "hankel", "circulant" or "ldr".
    norms: "shared": rows as they are; "chi": each row has a fresh norm of a
      Gaussian row, which brings the error down to that of independent rows.
    rank: displacement rank of "ldr" (4 if None); None for the other kinds.

  Raises:
    ValueError: unknown `kind` or `norms`, or a `rank` that is not a positive
      integer or has no use.

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

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}.")
    if self.norms not in ROW_NORMS:
      raise ValueError(f"norms must be one of {ROW_NORMS}, got {self.norms!r}.")
    if self.rank is None:
      return
    if self.kind != "ldr":
      raise ValueError(
        f"rank={self.rank!r} is for kind='ldr'; kind={self.kind!r} takes None."
      )
    check_positive_int("rank", self.rank)

  @property
  def info(self):
    """Facts; most depend on `kind`."""
    ldr = self.kind == "ldr"
    chi = self.norms == "chi"
    cost = {
      "toeplitz": "M + H draws",
      "hankel": "M + H draws",
      "circulant": "M draws",
      "ldr": "rank products of n x n matrices per block",
    }[self.kind]
    return WeightMatrixInfo(
      name="pmodel" if type(self) is PModel else f"pmodel_{self.kind}",
      group="structural",
      marginals="approximate" if ldr else "exact",
      source="Choromanski and Sindhwani 2016 (1605.09049)",
      summary=f"{self.kind} rows from few Gaussian numbers, inputs mixed",
      good_for="few random numbers; norms='chi' for the least variance",
      constraint="any num_features, any head_dim"
      + (" (padded to a power of two)" if ldr else ""),
      cost=cost + (", and M H for the norms" if chi else ""),
      variance="about 1"
      if chi
      else "trig 1.4 to 1.6, pos 1.2 to 1.4 at scale 0.2, H=32",
    )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    rows_rng, mix_rng, norm_rng = jax.random.split(rng, 3)
    make = self._whole if self.kind in ("toeplitz", "hankel") else self._stack
    rows = make(rows_rng, mix_rng, num_rows, head_dim)
    return {"w": chi_rows(norm_rng, rows) if self.norms == "chi" else rows}

  def _whole(self, rows_rng, mix_rng, num_rows, head_dim):
    """One Toeplitz or Hankel matrix for all rows."""
    budget = jax.random.normal(
      rows_rng, (num_rows + head_dim - 1,), dtype=jnp.float32
    )
    make = toeplitz if self.kind == "toeplitz" else hankel
    return mix_inputs(mix_rng, make(budget, num_rows, head_dim)[None])[0]

  def _stack(self, rows_rng, mix_rng, num_rows, head_dim):
    """Independent square blocks."""
    ldr = self.kind == "ldr"
    n = next_power_of_two(head_dim) if ldr else head_dim

    def draw_block(rng, num_blocks):
      if ldr:
        blocks = low_displacement(rng, num_blocks, n, self.rank or RANK)
      else:
        blocks = circulant(
          jax.random.normal(rng, (num_blocks, n), dtype=jnp.float32)
        )
      return mix_inputs(mix_rng, blocks)

    return draw_blocks(draw_block, rows_rng, num_rows, n)[:, :head_dim]


def mix_inputs(rng: Array, blocks: Array) -> Array:
  """Blocks ``[blocks, rows, n]`` times ``D1 H D0``, or D0 for other n.

  Example:
    >>> mixed = mix_inputs(jax.random.key(0), jnp.eye(4)[None])[0]
    >>> abs(mixed).round(3)[0].tolist()
    [0.5, 0.5, 0.5, 0.5]
  """
  num_blocks, _, n = blocks.shape
  signs = jax.random.rademacher(rng, (2, num_blocks, 1, n), jnp.float32)
  if next_power_of_two(n) == n:
    table = jnp.asarray(hadamard(n))
    blocks = jnp.matmul(blocks * signs[1], table, precision="highest")
  return blocks * signs[0]


def _fixed(value):
  """A field of a subclass that is settled, not an option."""
  return dataclasses.field(default=value, init=False)


@WEIGHT_MATRICES.register("pmodel_toeplitz")
@dataclasses.dataclass(frozen=True)
class PModelToeplitz(PModel):
  """`PModel` of kind "toeplitz": equal entries along diagonals.

  Its `kind` is settled, and it has no `rank`.

  Args:
    norms: "shared" or "chi", as in `PModel`.

  Raises:
    ValueError: unknown `norms`.

  References:
    Choromanski and Sindhwani 2016 (1605.09049).

  Example:
    >>> PModelToeplitz().info.name
    'pmodel_toeplitz'
  """

  kind: str = _fixed("toeplitz")
  rank: None = _fixed(None)


@WEIGHT_MATRICES.register("pmodel_hankel")
@dataclasses.dataclass(frozen=True)
class PModelHankel(PModel):
  """`PModel` of kind "hankel": equal entries along antidiagonals.

  Its `kind` is settled, and it has no `rank`.

  Args:
    norms: "shared" or "chi", as in `PModel`.

  Raises:
    ValueError: unknown `norms`.

  References:
    Choromanski and Sindhwani 2016 (1605.09049).

  Example:
    >>> PModelHankel().info.name
    'pmodel_hankel'
  """

  kind: str = _fixed("hankel")
  rank: None = _fixed(None)


@WEIGHT_MATRICES.register("pmodel_circulant")
@dataclasses.dataclass(frozen=True)
class PModelCirculant(PModel):
  """`PModel` of kind "circulant": shifts of one Gaussian vector per block.

  Its `kind` is settled, and it has no `rank`.

  Args:
    norms: "shared" or "chi", as in `PModel`.

  Raises:
    ValueError: unknown `norms`.

  References:
    Choromanski and Sindhwani 2016 (1605.09049).

  Example:
    >>> PModelCirculant().info.name
    'pmodel_circulant'
  """

  kind: str = _fixed("circulant")
  rank: None = _fixed(None)


@WEIGHT_MATRICES.register("pmodel_ldr")
@dataclasses.dataclass(frozen=True)
class PModelLDR(PModel):
  """`PModel` of kind "ldr": low displacement rank.

  Args:
    norms: "shared" or "chi", as in `PModel`.
    rank: displacement rank, 4 if None: more is closer to independent rows.

  Raises:
    ValueError: unknown `norms`, or a `rank` that is not a positive integer.

  References:
    Choromanski and Sindhwani 2016 (1605.09049).

  Example:
    >>> PModelLDR(rank=2).info.name
    'pmodel_ldr'
  """

  kind: str = _fixed("ldr")
