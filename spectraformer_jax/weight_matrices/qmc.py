"""Rows from quasi-Monte Carlo points: evenly spread over the unit cube.

A point is ``[H]`` uint32: the integer u 2**32 stands for the coordinate u in
[0, 1). In integers, random shifts and the number of points in a cell are exact.
"""

import dataclasses
import functools
import importlib.resources
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array, Projection
from spectraformer_jax.weight_matrices import base, pieces, row_laws

# Laine and Karras 2011, Stratified Sampling for Stochastic Transparency. The
# multipliers are even, so that a bit depends on itself and on lower bits alone.
_HASH_MULTIPLIERS = (0x6C50B47C, 0xB82F1E52, 0xC7AFE638, 0x8D22F6E6)
# Shape of the table of Sobol directions: coordinates, bits.
MAX_DIM, MAX_BITS = 256, 20
SEQUENCES = ("sobol", "lattice", "halton")
SCRAMBLINGS = ("shift", "lms", "owen")
MULTIPLIERS = ("best", "random")
# Most rows of a lattice with random multipliers: its products fit into uint32.
MAX_RANDOM_LATTICE = 2**16
_SOURCES = {
  "sobol": "Avron et al. 2016, section 3; Sobol points of Joe and Kuo 2008",
  "lattice": "Avron et al. 2016, section 3; Korobov 1959",
  "halton": "Avron et al. 2016, section 3; Halton 1960",
}
_VARIANCES = {
  "sobol": "trig 0.49 at scale 0.2, pos 0.14 at 0.1; H=32, M=128",
  "lattice": "trig 0.75 at scale 0.2, pos 0.24 at 0.1 (random multiplier: 1.6, "
  "0.48); H=32, M=128",
  "halton": "trig 3.1 at scale 0.2, pos 1.5 at 0.1; H=32, M=128",
}


@functools.lru_cache
def sobol_directions() -> np.ndarray:
  """Loads the direction numbers of the Sobol sequence (Joe and Kuo, 2008).

  They are derived from the points of scipy 1.17. Point 2**c of the Gray-code
  order is the point before it XOR direction number c. So column c of
  ``sobol_directions.npy`` is made by::

    sobol = scipy.stats.qmc.Sobol(256, scramble=False, bits=30)
    sobol.fast_forward(2**c - 1)  # not for c = 0: the first call would return 0
    before, after = (sobol.random(2) * 2.0**30).astype(np.uint32)
    table[:, c] = (before ^ after) << 2

  Returns:
    ``[MAX_DIM, MAX_BITS]`` uint32, most significant bit first, read-only.
  """
  folder = importlib.resources.files("spectraformer_jax.weight_matrices")
  with folder.joinpath("sobol_directions.npy").open("rb") as file:
    return pieces.read_only(np.load(file))


def sobol_points(directions: Array, num_points: int) -> Array:
  """Returns the first points of the digital sequence of given directions.

  Args:
    directions: direction numbers ``[H, bits]`` uint32, most significant bit
      first, with at least ``ceil(log2 M)`` bits.
    num_points: M.

  Returns:
    ``[M, H]`` uint32, in Gray-code order from the origin.

  Example:
    >>> table = jnp.asarray(sobol_directions()[:2])
    >>> (sobol_points(table, 4) >> 30).tolist()
    [[0, 0], [2, 2], [3, 1], [1, 3]]
  """
  index = np.arange(num_points, dtype=np.uint32)
  gray = index ^ (index >> 1)
  points = jnp.zeros((num_points, directions.shape[0]), jnp.uint32)
  for column in range((num_points - 1).bit_length()):
    chosen = (gray >> column & 1).astype(bool)
    flips = jnp.where(chosen[:, None], directions[None, :, column], 0)
    points ^= flips
  return points


@functools.lru_cache(maxsize=16)
def halton_points(num_points: int, dim: int) -> np.ndarray:
  """Returns Halton points ``[M, H]`` uint32; the bases are the first primes."""
  points = np.zeros((num_points, dim))
  for axis, prime in enumerate(_primes(dim)):
    index, scale = np.arange(num_points), 1.0
    while index.any():
      scale /= prime
      points[:, axis] += scale * (index % prime)
      index //= prime
  return _to_bits(points)


@functools.lru_cache(maxsize=16)
def lattice_points(num_points: int, dim: int) -> np.ndarray:
  """Returns a Korobov lattice ``[M, H]`` uint32.

  Coordinate j of point m is the fractional part of m a**j / M. Of the
  multipliers a that are tried, the chosen one has the least sum of the lattice
  criterion P2 over all pairs of coordinates. A bad multiplier repeats
  coordinates: 17 has only 8 different powers modulo 128.
  """
  best = min(
    _multipliers(num_points, dim),
    key=lambda a: _pair_criterion(_korobov(num_points, dim, a)),
  )
  return _to_bits(_korobov(num_points, dim, best))


def random_lattice_points(rng: Array, num_points: int, dim: int) -> Array:
  """Draws a Korobov lattice ``[M, H]`` uint32 with a random multiplier.

  The multiplier is an odd number below M. M is at most 2**16; products of
  larger numbers would overflow.
  """
  size = jnp.uint32(num_points)
  half = jax.random.randint(rng, (), 0, max(num_points // 2, 1), jnp.int32)
  multiplier = 2 * half.astype(jnp.uint32) + 1

  def step(power: Array, _: None) -> tuple[Array, Array]:
    return power * multiplier % size, power

  _, powers = jax.lax.scan(step, jnp.uint32(1), length=dim)
  index = np.arange(num_points, dtype=np.uint32)
  points = index[:, None] * powers[None, :] % size
  if num_points == 1:
    return points
  # The integer part of points * 2**32 / M, without overflow.
  whole, rest = divmod(2**32, num_points)
  return points * jnp.uint32(whole) + points * jnp.uint32(rest) // size


def digital_shift(rng: Array, points: Array) -> Array:
  """Flips the same random bits in all points; a digital net stays a net."""
  shift = jax.random.bits(rng, (1, points.shape[1]), jnp.uint32)
  return points ^ shift


def modular_shift(rng: Array, points: Array) -> Array:
  """Adds a random vector modulo 1 to all points; a lattice stays a lattice."""
  shift = jax.random.bits(rng, (1, points.shape[1]), jnp.uint32)
  return points + shift


def scramble_directions(rng: Array, directions: Array) -> Array:
  """Scrambles direction numbers ``[H, bits]`` linearly (Matousek 1998).

  Multiplies the bits of each coordinate by a random lower triangular matrix
  over GF(2) with ones on its diagonal: an output bit depends on the input bit
  at its place and on the more significant ones.
  """
  place = np.arange(32, dtype=np.uint64)
  unit = (np.uint64(1) << (31 - place)).astype(np.uint32)
  above = ~(unit | (unit - np.uint32(1)))
  rows = jax.random.bits(rng, (directions.shape[0], 32), jnp.uint32)
  rows = rows & above[None, :] | unit[None, :]
  parity = jax.lax.population_count(rows[:, :, None] & directions[:, None, :])
  bits = (parity & 1) * unit[None, :, None]
  return jnp.sum(bits, axis=1, dtype=jnp.uint32)


def owen_scramble(rng: Array, points: Array) -> Array:
  """Scrambles points by Owen's nested uniform scramble.

  A hash (Laine and Karras) of all more significant bits decides whether a bit
  flips; each coordinate has a random seed. Each point alone is exactly uniform,
  and a digital net stays a net.
  """
  seed = jax.random.bits(rng, (1, points.shape[1]), jnp.uint32)
  hashed = _reverse_bits(points) + seed
  for multiplier in _HASH_MULTIPLIERS:
    hashed ^= hashed * jnp.uint32(multiplier)
  return _reverse_bits(hashed)


def _reverse_bits(x: Array) -> Array:
  """Reverses the 32 bits of each integer."""
  for shift in (1, 2, 4, 8):
    # 0x55555555, 0x33333333, 0x0F0F0F0F, 0x00FF00FF.
    mask = jnp.uint32((2**32 - 1) // (2**shift + 1))
    x = (x >> shift & mask) | ((x & mask) << shift)
  return (x >> 16) | (x << 16)


def _primes(count: int) -> list[int]:
  """Returns the first `count` primes."""
  primes: list[int] = []
  candidate = 2
  while len(primes) < count:
    if all(candidate % prime for prime in primes):
      primes.append(candidate)
    candidate += 1
  return primes


def _multipliers(num_points: int, dim: int) -> list[int]:
  """Returns up to 64 numbers coprime to `num_points`; fewer for large sizes."""
  candidates = np.arange(1, max(num_points // 2, 1) + 1)
  coprime = candidates[np.gcd(candidates, num_points) == 1].tolist()
  trials = min(max(2**23 // (num_points * dim), 8), 64)
  return coprime[:: -(-len(coprime) // trials)]


def _korobov(num_points: int, dim: int, multiplier: int) -> np.ndarray:
  """Returns the lattice points ``[M, H]`` float64 of one multiplier."""
  generator = [pow(multiplier, axis, num_points) for axis in range(dim)]
  index = np.arange(num_points, dtype=np.int64)
  return index[:, None] * np.array(generator) % num_points / num_points


def _pair_criterion(points: np.ndarray) -> float:
  """Sums the criterion P2 over pairs of coordinates, up to a factor."""
  bernoulli = points * (points - 1.0) + 1.0 / 6.0
  total = np.sum(bernoulli, axis=1)
  return float(np.sum(total**2) - np.sum(bernoulli**2))


def _to_bits(points: np.ndarray) -> np.ndarray:
  """Returns coordinates u in [0, 1) as integers u 2**32, uint32, read-only."""
  return pieces.read_only(np.floor(points * 2.0**32).astype(np.uint32))


@base.WEIGHT_MATRICES.register("qmc")
@dataclasses.dataclass(frozen=True)
class QMC(base.WeightMatrix):
  r"""Quasi-Monte Carlo: evenly spread points through the inverse cdf.

  .. math::
    W_{mj} = F^{-1}(u_{mj}), \quad u_1, \ldots, u_M
    \text{ the first points of a randomised sequence in } [0, 1)^H

  Entry (m, j) is coordinate j of point m, mapped by the inverse cdf of the
  component's row law (any law). The randomisation makes each point alone
  uniform, so each row has exactly this law and every component stays unbiased.
  If M is a power of two, Sobol points, under each scrambling, put exactly one
  point into each of M equal cells of every coordinate; for another M the points
  are a little less balanced. The variance is low for positive maps at small
  distances, and for trigonometric ones.

  Args:
    sequence: "sobol"; "lattice" (Korobov); "halton", whose coordinates beyond
      about the tenth are strongly correlated: worse than independent rows.
    scrambling: "shift" (of the bits for Sobol, modulo 1 for the others); for
      Sobol also "lms", a random linear scramble and a shift, and "owen", a
      nested uniform scramble by a hash.
    multiplier: the integer a of the lattice, whose coordinate j steps by
      a^j / M: "best", good for all pairs of coordinates, or "random", an odd
      one for each draw (M up to 2**16). A random multiplier often repeats
      coordinates: worse than independent rows for trigonometric maps.

  Raises:
    ValueError: unknown `sequence`, `scrambling` or `multiplier`, or one that
      this sequence does not have. When built: more than 256 dimensions or 2**20
      rows for Sobol, more than 2**16 rows for random multipliers.

  References:
    Avron, Sindhwani, Yang and Mahoney, Quasi-Monte Carlo Feature Maps for
    Shift-Invariant Kernels, 2016, section 3 (1412.8293); Matousek 1998 (lms);
    Owen 1995 and Laine and Karras 2011 (owen).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "qmc", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> (w > 0).sum(axis=0).tolist()
    [4, 4, 4, 4]
  """

  sequence: str = "sobol"
  scrambling: str = "shift"
  multiplier: str = "best"

  name: ClassVar[str] = "qmc"

  def __post_init__(self) -> None:
    check_choice("sequence", self.sequence, SEQUENCES)
    check_choice("scrambling", self.scrambling, SCRAMBLINGS)
    check_choice("multiplier", self.multiplier, MULTIPLIERS)
    if self.sequence != "sobol" and self.scrambling != "shift":
      raise ValueError(
        f"scrambling={self.scrambling!r} is for sequence='sobol' alone, got "
        f"sequence={self.sequence!r}: use scrambling='shift'."
      )
    if self.sequence != "lattice" and self.multiplier != "best":
      raise ValueError(
        f"multiplier={self.multiplier!r} is for sequence='lattice' alone, got "
        f"sequence={self.sequence!r}: leave it out."
      )

  def _info(self) -> base.WeightMatrixInfo:
    limits = f"num_features <= 2**{MAX_BITS}, head_dim <= {MAX_DIM}"
    constraint = base.WeightMatrixInfo.constraint
    return base.WeightMatrixInfo(
      name=self.name,
      group="unit cube",
      marginals="exact",
      source=_SOURCES[self.sequence],
      summary=f"{self.sequence} points, randomised, through the inverse cdf",
      good_for="positive maps, and trigonometric ones with M >> H; any row law",
      row_laws=row_laws.ENTRY_LAWS,
      constraint=limits if self.sequence == "sobol" else constraint,
      cost="M H log2 M integer operations and M H inverse cdfs",
      variance=_VARIANCES[self.sequence],
    )

  info = base.info_from_options(_info)

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    if self.multiplier == "random" and num_rows > MAX_RANDOM_LATTICE:
      raise ValueError(
        f"weight matrix {self.name!r} has random multipliers for num_features "
        f"<= {MAX_RANDOM_LATTICE}, got num_features={num_rows}: use "
        "multiplier='best'."
      )
    too_large = head_dim > MAX_DIM or num_rows > 2**MAX_BITS
    if self.sequence == "sobol" and too_large:
      raise ValueError(
        f"weight matrix {self.name!r} has Sobol points for head_dim <= "
        f"{MAX_DIM} and num_features <= {2**MAX_BITS}, got head_dim={head_dim} "
        f"and num_features={num_rows}: use 'orf' or 'lhs'."
      )

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: row_laws.RowLaw
  ) -> Projection:
    bits = self._draw_points(rng, num_rows, head_dim)
    return {"w": law.from_uniform(row_laws.bits_to_open_uniform(bits))}

  def _draw_points(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    """Draws randomised points ``[M, H]`` uint32."""
    if self.sequence == "sobol":
      directions = jnp.asarray(sobol_directions()[:head_dim])
      if self.scrambling == "lms":
        rng, scramble_rng = jax.random.split(rng)
        directions = scramble_directions(scramble_rng, directions)
      points = sobol_points(directions, num_rows)
      if self.scrambling == "owen":
        return owen_scramble(rng, points)
      return digital_shift(rng, points)
    if self.sequence == "halton":
      points = jnp.asarray(halton_points(num_rows, head_dim))
    elif self.multiplier == "best":
      points = jnp.asarray(lattice_points(num_rows, head_dim))
    else:
      rng, multiplier_rng = jax.random.split(rng)
      points = random_lattice_points(multiplier_rng, num_rows, head_dim)
    return modular_shift(rng, points)


QMCSobol = base.WEIGHT_MATRICES.alias(
  "qmc_sobol", "QMCSobol", QMC, sequence="sobol", multiplier="best"
)
QMCLattice = base.WEIGHT_MATRICES.alias(
  "qmc_lattice", "QMCLattice", QMC, sequence="lattice", scrambling="shift"
)
QMCHalton = base.WEIGHT_MATRICES.alias(
  "qmc_halton",
  "QMCHalton",
  QMC,
  sequence="halton",
  scrambling="shift",
  multiplier="best",
)
