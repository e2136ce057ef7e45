"""Rows in directions of a structured, low-energy point set on the sphere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.building_blocks import (
  chi_norms,
  chi_ppf,
  haar,
  stratified_uniforms,
)

NORMS = ("stratified", "chi")
_SWEEPS = 3
_MAX_CANDIDATES = 256


@WEIGHT_MATRICES.register("ssf")
@dataclasses.dataclass(frozen=True)
class SSF(WeightMatrix):
  r"""Spherical structured features: harmonic points of least Riesz energy.

  .. math::
    W = \mathrm{diag}(r)\, P\, Q, \quad Q \sim \mathrm{Haar}(H), \quad
    P_\tau = m^{-1/2} [\cos(2\pi k\tau/n), \sin(2\pi k\tau/n)]_{k \in \Lambda}

  with m = ceil(H / 2) frequencies, n = ceil(M / 2) times tau, and a second
  half of P in which (cos, sin) becomes (-sin, cos). The frequencies are chosen
  once for each (M, H), on the host, by coordinate descent on the energy
  :math:`\sum_{i \neq j} |p_i - p_j|^{-2}`. The rotation makes each row exactly
  N(0, I) (the points alone are deterministic, and biased); for an odd H it
  turns H + 1 coordinates, of which the last is dropped. Low variance for
  trigonometric and positive maps.

  Args:
    norms: "stratified", one row in each 1/M of the chi law, or "chi",
      independent norms.

  Raises:
    ValueError: unknown `norms`; when built, num_features below
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

  info = WeightMatrixInfo(
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

  def __post_init__(self):
    if self.norms not in NORMS:
      raise ValueError(f"norms must be one of {NORMS}, got {self.norms!r}.")

  def check(self, num_rows, head_dim):
    """See `WeightMatrix.check`."""
    least = 2 * _num_frequencies(head_dim) + 1
    if num_rows < least:
      raise ValueError(
        "weight matrix 'ssf' needs num_features > 2 ceil(head_dim / 2), got "
        f"num_features={num_rows} and head_dim={head_dim}: use at least "
        f"{least} features, or 'orf'."
      )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    del law  # Gaussian only
    rotation_rng, norm_rng = jax.random.split(rng)
    points = jnp.asarray(structured_points(num_rows, head_dim))
    rotation = haar(rotation_rng, 1, points.shape[1])[0, :, :head_dim]
    directions = jnp.matmul(points, rotation, precision="highest")
    lengths = jnp.sqrt(jnp.sum(jnp.square(directions), axis=-1))
    if self.norms == "chi":
      radii = chi_norms(norm_rng, num_rows, head_dim)
    else:
      radii = chi_ppf(stratified_uniforms(norm_rng, num_rows), head_dim)
    return {"w": (radii / lengths)[:, None] * directions}


@functools.lru_cache(maxsize=16)
def structured_points(num_rows: int, head_dim: int) -> np.ndarray:
  """Unit points ``[M, 2 ceil(H / 2)]`` float32, numpy, read-only.

  An odd num_rows drops the last point.
  """
  frequencies = np.array(choose_frequencies(num_rows, head_dim))
  times = np.arange(-(-num_rows // 2))
  angles = 2.0 * np.pi * np.outer(times, frequencies) / len(times)
  cos, sin = np.cos(angles), np.sin(angles)
  points = np.block([[cos, sin], [-sin, cos]])[:num_rows]
  points = (points / np.sqrt(len(frequencies))).astype(np.float32)
  points.flags.writeable = False
  return points


@functools.lru_cache(maxsize=16)
def choose_frequencies(num_rows: int, head_dim: int) -> tuple[int, ...]:
  """Frequencies of low energy: m different ones of 1 .. n - 1.

  Coordinate descent: one frequency after the other is swapped for the unused
  one that lowers the energy most (of at most 256 tried).
  """
  size, num_times = _num_frequencies(head_dim), -(-num_rows // 2)
  lags = np.arange(num_times)
  golden = (np.sqrt(5.0) - 1.0) / 2.0
  order = np.argsort(np.arange(1, num_times) * golden % 1.0) + 1
  chosen, unused = list(order[:size]), list(order[size:])

  circle = 2.0 * np.pi * lags / num_times
  cosines, sines = np.cos(circle), np.sin(circle)

  def waves(frequencies):
    steps = np.outer(frequencies, lags) % num_times
    return cosines[steps], sines[steps]

  def energies(cos_sum, sin_sum):
    within = 2.0 - 2.0 * cos_sum[:, 1:] / size
    across = 2.0 - 2.0 * sin_sum / size
    # Frequencies with a common period repeat points: finite, but never best.
    distances = np.concatenate([within, across], axis=1)
    return np.sum(1.0 / np.maximum(distances, 1e-9), axis=1)

  stride = -(-len(unused) // _MAX_CANDIDATES) if unused else 1
  cos_sum, sin_sum = (wave.sum(axis=0) for wave in waves(chosen))
  for sweep in range(_SWEEPS):
    for place in range(size):
      tried = range((sweep * size + place) % stride, len(unused), stride)
      cos, sin = waves([chosen[place], *(unused[i] for i in tried)])
      cos_sum, sin_sum = cos_sum - cos[0], sin_sum - sin[0]
      best = int(np.argmin(energies(cos_sum + cos, sin_sum + sin)))
      cos_sum, sin_sum = cos_sum + cos[best], sin_sum + sin[best]
      if best:
        i = tried[best - 1]
        chosen[place], unused[i] = unused[i], chosen[place]
  return tuple(int(frequency) for frequency in sorted(chosen))


def _num_frequencies(head_dim: int) -> int:
  """Frequencies, two coordinates each, that fill head_dim."""
  return -(-head_dim // 2)
