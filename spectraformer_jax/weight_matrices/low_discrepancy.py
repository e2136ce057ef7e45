"""Evenly spread points of the unit cube and their randomisation, on integers.

A point is ``[H]`` uint32: coordinate u in [0, 1) is the integer u 2**32. On
integers a random shift is exact, and so is every count of points in a cell.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.typing import Array

# Laine and Karras 2011, Stratified Sampling for Stochastic Transparency: even
# multipliers, so that a bit depends on itself and lower bits alone.
_HASH_MULTIPLIERS = (0x6C50B47C, 0xB82F1E52, 0xC7AFE638, 0x8D22F6E6)


def sobol_points(directions: Array, num_points: int) -> Array:
  """Points of the digital sequence with these direction numbers.

  Args:
    directions: ``[H, C]`` uint32, most significant bit first, with at least
      ``ceil(log2 M)`` columns.
    num_points: M.

  Returns:
    ``[M, H]`` uint32, in Gray-code order from the origin.

  Example:
    >>> from spectraformer_jax.weight_matrices import sobol_table
    >>> table = jnp.asarray(sobol_table.sobol_directions()[:2])
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
  """Halton points ``[M, H]`` uint32: radical inverses in the first primes."""
  points = np.zeros((num_points, dim))
  for axis, base in enumerate(_primes(dim)):
    index, scale = np.arange(num_points), 1.0
    while index.any():
      scale /= base
      points[:, axis] += scale * (index % base)
      index //= base
  return _to_bits(points)


@functools.lru_cache(maxsize=16)
def lattice_points(num_points: int, dim: int) -> np.ndarray:
  """Korobov lattice ``[M, H]`` uint32: coordinate j is frac(m a**j / M).

  The multiplier a has the least sum over all pairs of coordinates of the
  lattice criterion P2. A careless one repeats coordinates: a = 17 has only 8
  different powers modulo 128.
  """
  best = min(
    _multipliers(num_points, dim),
    key=lambda a: _pair_criterion(_korobov(num_points, dim, a)),
  )
  return _to_bits(_korobov(num_points, dim, best))


def random_lattice_points(rng: Array, num_points: int, dim: int) -> Array:
  """Korobov lattice ``[M, H]`` uint32 of a random odd multiplier below M.

  M is at most 2**16: up to there no product overflows.
  """
  size = jnp.uint32(num_points)
  half = jax.random.randint(rng, (), 0, max(num_points // 2, 1), jnp.int32)
  multiplier = 2 * half.astype(jnp.uint32) + 1
  step = lambda power, _: (power * multiplier % size, power)
  _, powers = jax.lax.scan(step, jnp.uint32(1), length=dim)
  index = np.arange(num_points, dtype=np.uint32)
  points = index[:, None] * powers[None, :] % size
  if num_points == 1:
    return points
  # The integer part of points * 2**32 / M.
  whole, rest = divmod(2**32, num_points)
  return points * jnp.uint32(whole) + points * jnp.uint32(rest) // size


def digital_shift(rng: Array, points: Array) -> Array:
  """Flips the same random bits in all points: keeps a digital net one."""
  shift = jax.random.bits(rng, (1, points.shape[1]), jnp.uint32)
  return points ^ shift


def modular_shift(rng: Array, points: Array) -> Array:
  """Adds one random vector modulo 1 to all points: keeps a lattice one."""
  shift = jax.random.bits(rng, (1, points.shape[1]), jnp.uint32)
  return points + shift


def scramble_directions(rng: Array, directions: Array) -> Array:
  """Random linear scramble of direction numbers ``[H, C]`` (Matousek 1998).

  Each coordinate's bits are multiplied by a random lower triangular matrix
  over GF(2) with ones on its diagonal: an output bit depends on the input bit
  at its place and on those above it.
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
  """Nested uniform scramble: a bit flips by a hash of all the bits above it.

  The hash is Laine and Karras's, with one random seed a coordinate: each
  point alone is exactly uniform, and a digital net stays one.
  """
  seed = jax.random.bits(rng, (1, points.shape[1]), jnp.uint32)
  hashed = _reverse_bits(points) + seed
  for multiplier in _HASH_MULTIPLIERS:
    hashed ^= hashed * jnp.uint32(multiplier)
  return _reverse_bits(hashed)


def _reverse_bits(x: Array) -> Array:
  """The 32 bits of each integer, last first."""
  for shift, mask in (
    (1, 0x55555555),
    (2, 0x33333333),
    (4, 0x0F0F0F0F),
    (8, 0x00FF00FF),
  ):
    mask = jnp.uint32(mask)
    x = (x >> shift & mask) | ((x & mask) << shift)
  return (x >> 16) | (x << 16)


def _primes(count: int) -> list[int]:
  """The first `count` primes."""
  primes: list[int] = []
  candidate = 2
  while len(primes) < count:
    if all(candidate % prime for prime in primes):
      primes.append(candidate)
    candidate += 1
  return primes


def _multipliers(num_points: int, dim: int) -> list[int]:
  """Some multipliers coprime to `num_points`, fewer for large tables."""
  candidates = np.arange(1, max(num_points // 2, 1) + 1)
  coprime = candidates[np.gcd(candidates, num_points) == 1].tolist()
  trials = min(max(2**23 // (num_points * dim), 8), 64)
  return coprime[:: -(-len(coprime) // trials)]


def _korobov(num_points: int, dim: int, multiplier: int) -> np.ndarray:
  """Lattice points ``[M, H]`` float64 of one multiplier."""
  generator = [pow(multiplier, axis, num_points) for axis in range(dim)]
  index = np.arange(num_points, dtype=np.int64)
  return index[:, None] * np.array(generator) % num_points / num_points


def _pair_criterion(points: np.ndarray) -> float:
  """P2 summed over pairs of coordinates, up to a factor."""
  bernoulli = points * (points - 1.0) + 1.0 / 6.0
  total = np.sum(bernoulli, axis=1)
  return float(np.sum(total**2) - np.sum(bernoulli**2))


def _to_bits(points: np.ndarray) -> np.ndarray:
  """Coordinates in [0, 1) as read-only uint32."""
  bits = np.floor(points * 2.0**32).astype(np.uint32)
  bits.flags.writeable = False
  return bits
