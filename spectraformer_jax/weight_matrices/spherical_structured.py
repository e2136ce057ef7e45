"""Rows whose directions are structured points of low energy on the sphere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array
from spectraformer_jax.weight_matrices import base, pieces

STRATIFIED_OR_CHI = ("stratified", "chi")
# Sweeps of the search for frequencies, and candidates for each replacement.
_SWEEPS = 3
_MAX_CANDIDATES = 256


@base.WEIGHT_MATRICES.register("ssf")
@dataclasses.dataclass(frozen=True)
class SSF(base.GaussianRows):
  r"""Spherical structured features: harmonic points of least Riesz energy.

  .. math::
    W = \mathrm{diag}(r)\, P\, Q, \quad Q \sim \mathrm{Haar}(H), \quad
    P_\tau = m^{-1/2} [\cos(2\pi k\tau/n), \sin(2\pi k\tau/n)]_{k \in \Lambda}

  :math:`\Lambda` has m = ceil(H / 2) integer frequencies k; :math:`\tau` takes
  n = ceil(M / 2) values: 0 .. n - 1. These are half of the points; in the other
  half (-sin, cos) replaces (cos, sin). The frequencies are chosen once for each
  (M, H), on the host, by coordinate descent on the energy
  :math:`\sum_{i \neq j} |p_i - p_j|^{-2}` of the rows p of P. The random
  rotation and the random norms make each row of W exactly N(0, I); the points
  alone are deterministic, and biased. If H is odd, the rotation acts on H + 1
  coordinates and the last one is dropped. The variance is low for trigonometric
  and positive maps.

  Args:
    norms: both of the chi law: "stratified" (one norm in each of M cells of
      probability 1/M) or "chi" (independent norms).

  Raises:
    ValueError: unknown `norms`. When built: num_features below
      2 ceil(head_dim / 2) + 1.

  References:
    Lyu, Spherical Structured Feature Maps for Kernel Approximation, 2017,
    section 3.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "ssf", num_features=16)
    >>> fm.init(jax.random.key(0), head_dim=8).projection["rows"]["w"].shape
    (1, 16, 8)
  """

  norms: str = "stratified"

  info = base.WeightMatrixInfo(
    name="ssf",
    group="unit cube",
    marginals="exact",
    source="Lyu 2017, section 3",
    summary="rotated harmonic points of least Riesz energy on the sphere",
    good_for="trigonometric and positive maps with M >= 2 H",
    constraint="num_features > 2 ceil(head_dim / 2)",
    cost="one QR factorisation of H x H; a host search once per (M, H)",
    variance="trig 0.48, pos 0.51 at scale 0.2, H=32, M=128",
  )

  def __post_init__(self) -> None:
    check_choice("norms", self.norms, STRATIFIED_OR_CHI)

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    least = 2 * _num_frequencies(head_dim) + 1
    if num_rows < least:
      raise ValueError(
        "weight matrix 'ssf' needs num_features > 2 ceil(head_dim / 2), got "
        f"num_features={num_rows} and head_dim={head_dim}: use at least "
        f"{least} features, or 'orf'."
      )

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    rotation_rng, norm_rng = jax.random.split(rng)
    points = jnp.asarray(structured_points(num_rows, head_dim))
    rotation = pieces.haar(rotation_rng, 1, points.shape[1])[0, :, :head_dim]
    directions = jnp.matmul(points, rotation, precision="highest")
    norms = pieces.row_norms(norm_rng, self.norms, num_rows, head_dim)
    return pieces.set_norms(directions, norms)


@functools.lru_cache(maxsize=16)
def structured_points(num_rows: int, head_dim: int) -> np.ndarray:
  """Returns unit points P ``[M, 2 ceil(H / 2)]`` float32, NumPy, read-only.

  An odd M drops the last point.
  """
  frequencies = np.array(choose_frequencies(num_rows, head_dim))
  times = np.arange(-(-num_rows // 2))
  angles = 2.0 * np.pi * np.outer(times, frequencies) / len(times)
  cos, sin = np.cos(angles), np.sin(angles)
  points = np.block([[cos, sin], [-sin, cos]])[:num_rows]
  points = points / np.sqrt(len(frequencies))
  return pieces.read_only(points.astype(np.float32))


@functools.lru_cache(maxsize=16)
def choose_frequencies(num_rows: int, head_dim: int) -> tuple[int, ...]:
  """Returns m different frequencies of 1 .. n - 1 with a low energy.

  Coordinate descent: replaces one frequency after the other by the unused
  frequency, of at most 256 candidates, that lowers the energy most. n is
  ceil(num_rows / 2), m is ceil(head_dim / 2).
  """
  size, num_times = _num_frequencies(head_dim), -(-num_rows // 2)
  lags = np.arange(num_times)
  # Multiples of the golden ratio give a fixed order that mixes all frequencies.
  golden = (np.sqrt(5.0) - 1.0) / 2.0
  order = np.argsort(np.arange(1, num_times) * golden % 1.0) + 1
  chosen, unused = list(order[:size]), list(order[size:])

  circle = 2.0 * np.pi * lags / num_times
  cosines, sines = np.cos(circle), np.sin(circle)

  def waves(frequencies: list[int]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.outer(frequencies, lags) % num_times
    return cosines[steps], sines[steps]

  def energies(cos_sum: np.ndarray, sin_sum: np.ndarray) -> np.ndarray:
    # Squared distances at each lag, within a half of the points and across.
    within = 2.0 - 2.0 * cos_sum[:, 1:] / size
    across = 2.0 - 2.0 * sin_sum / size
    # Frequencies with a common period repeat points: a large, finite energy.
    distances = np.concatenate([within, across], axis=1)
    return np.sum(1.0 / np.maximum(distances, 1e-9), axis=1)

  stride = -(-len(unused) // _MAX_CANDIDATES) if unused else 1
  cos_sum, sin_sum = (wave.sum(axis=0) for wave in waves(chosen))
  for sweep in range(_SWEEPS):
    for place in range(size):
      # Every stride-th unused frequency, from another start each time.
      candidates = range((sweep * size + place) % stride, len(unused), stride)
      cos, sin = waves([chosen[place], *(unused[i] for i in candidates)])
      cos_sum, sin_sum = cos_sum - cos[0], sin_sum - sin[0]
      best = int(np.argmin(energies(cos_sum + cos, sin_sum + sin)))
      cos_sum, sin_sum = cos_sum + cos[best], sin_sum + sin[best]
      if best:
        i = candidates[best - 1]
        chosen[place], unused[i] = unused[i], chosen[place]
  return tuple(int(frequency) for frequency in sorted(chosen))


def _num_frequencies(head_dim: int) -> int:
  """Returns the number of frequencies: each fills two coordinates."""
  return -(-head_dim // 2)
