"""Rows from quasi-Monte Carlo points: evenly spread over the unit cube."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from spectraformer_jax.weight_matrices.base import (
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
)
from spectraformer_jax.weight_matrices.low_discrepancy import (
  digital_shift,
  halton_points,
  lattice_points,
  modular_shift,
  owen_scramble,
  random_lattice_points,
  scramble_directions,
  sobol_points,
)
from spectraformer_jax.weight_matrices.row_laws import (
  ENTRY_LAWS,
  bits_to_open_uniform,
)
from spectraformer_jax.weight_matrices.sobol_table import (
  MAX_BITS,
  MAX_DIM,
  sobol_directions,
)

SEQUENCES = ("sobol", "lattice", "halton")
SCRAMBLINGS = ("shift", "lms", "owen")
MULTIPLIERS = ("best", "random")
MAX_RANDOM_LATTICE = 2**16
_SOURCES = {
  "sobol": "Avron et al. 2016, section 3; Sobol points of Joe and Kuo 2008",
  "lattice": "Avron et al. 2016, section 3; Korobov 1959",
  "halton": "Avron et al. 2016, section 3; Halton 1960",
}
_VARIANCES = {
  "sobol": "trig 0.49, pos 0.14 (at 0.1) at scale 0.2, H=32, M=128",
  "lattice": "trig 0.75, pos 0.24 (at 0.1) at scale 0.2, H=32, M=128; random "
  "multiplier: trig 1.6, pos 0.48",
  "halton": "trig 3.1, pos 1.5 (at 0.1) at scale 0.2, H=32, M=128",
}


@WEIGHT_MATRICES.register("qmc")
@dataclasses.dataclass(frozen=True)
class QMC(WeightMatrix):
  r"""Quasi-Monte Carlo: evenly spread points through the inverse cdf.

  .. math::
    W_{mj} = F^{-1}(u_{mj}), \quad u_1, \ldots, u_M
    \text{ the first points of a randomised sequence in } [0, 1)^H

  The row is the point and the column the dimension. Randomised, each point
  alone is uniform, so each row has exactly the component's law (any law) and
  every component stays unbiased. Sobol points, under each scrambling, put
  exactly one of M = 2^k points into each 1/M of every coordinate; other M take
  the first M points, a little less balanced. Low variance for positive maps at
  small distances, and for trigonometric ones.

  Args:
    sequence: "sobol"; "lattice" (Korobov); "halton", whose coordinates beyond
      the tenth or so are strongly correlated: worse than independent rows.
    scrambling: "shift" (of bits for Sobol, modulo 1 for the others); for Sobol
      also "lms", a random linear scramble and a shift, and "owen", a nested
      uniform scramble by a hash.
    multiplier: a of the lattice, whose coordinate j steps by a^j / M: "best",
      good for all pairs of coordinates, or "random", an odd one for each draw
      (M up to 2**16). A random one often repeats coordinates: worse than
      independent rows for trigonometric maps.

  Raises:
    ValueError: unknown `sequence`, `scrambling` or `multiplier`, or one that is
      not of this sequence; when built, for Sobol, more than 256 dimensions or
      2**20 rows, for random multipliers more than 2**16 rows.

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

  def __post_init__(self):
    for name, known in (
      ("sequence", SEQUENCES),
      ("scrambling", SCRAMBLINGS),
      ("multiplier", MULTIPLIERS),
    ):
      value = getattr(self, name)
      if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}.")
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

  @property
  def info(self):
    """Facts; source, constraint and variance depend on `sequence`."""
    limits = f"num_features <= 2**{MAX_BITS}, head_dim <= {MAX_DIM}"
    constraint = WeightMatrixInfo.constraint
    return WeightMatrixInfo(
      name=self.name,
      group="unit cube",
      marginals="exact",
      source=_SOURCES[self.sequence],
      summary=f"{self.sequence} points, randomised, through the inverse cdf",
      good_for="positive maps, and trigonometric ones with M >> H; any row law",
      row_laws=ENTRY_LAWS,
      constraint=limits if self.sequence == "sobol" else constraint,
      cost="M H log2 M integer operations and M H inverse cdfs",
      variance=_VARIANCES[self.sequence],
    )

  def check(self, num_rows, head_dim):
    """See `WeightMatrix.check`."""
    if self.multiplier == "random" and num_rows > MAX_RANDOM_LATTICE:
      raise ValueError(
        f"weight matrix {self.name!r} has random multipliers for num_features "
        f"<= {MAX_RANDOM_LATTICE}, got num_features={num_rows}: use "
        "multiplier='best'."
      )
    if self.sequence != "sobol":
      return
    if head_dim > MAX_DIM or num_rows > 2**MAX_BITS:
      raise ValueError(
        f"weight matrix {self.name!r} has Sobol points for head_dim <= "
        f"{MAX_DIM} and num_features <= {2**MAX_BITS}, got head_dim={head_dim} "
        f"and num_features={num_rows}: use 'orf' or 'lhs'."
      )

  def draw(self, rng, num_rows, head_dim, law):
    """See `WeightMatrix.draw`."""
    bits = self._points(rng, num_rows, head_dim)
    return {"w": law.from_uniform(bits_to_open_uniform(bits))}

  def _points(self, rng, num_rows, head_dim):
    """Randomised points ``[M, H]`` uint32."""
    if self.multiplier == "random":
      rng, multiplier_rng = jax.random.split(rng)
      points = random_lattice_points(multiplier_rng, num_rows, head_dim)
      return modular_shift(rng, points)
    if self.sequence == "lattice":
      return modular_shift(rng, jnp.asarray(lattice_points(num_rows, head_dim)))
    if self.sequence == "halton":
      return modular_shift(rng, jnp.asarray(halton_points(num_rows, head_dim)))
    directions = jnp.asarray(sobol_directions()[:head_dim])
    if self.scrambling == "owen":
      return owen_scramble(rng, sobol_points(directions, num_rows))
    if self.scrambling == "lms":
      rng, scramble_rng = jax.random.split(rng)
      directions = scramble_directions(scramble_rng, directions)
    return digital_shift(rng, sobol_points(directions, num_rows))


@WEIGHT_MATRICES.register("qmc_sobol")
@dataclasses.dataclass(frozen=True)
class QMCSobol(QMC):
  """Sobol points: `QMC` with ``sequence="sobol"``.

  Args:
    scrambling: as for `QMC`.

  Raises:
    ValueError: as for `QMC`.

  References:
    Avron et al. 2016, section 3 (1412.8293); see `QMC`.

  Example:
    >>> QMCSobol(scrambling="owen").info.name
    'qmc_sobol'
  """

  sequence: str = dataclasses.field(default="sobol", init=False)
  multiplier: str = dataclasses.field(default="best", init=False)

  name: ClassVar[str] = "qmc_sobol"


@WEIGHT_MATRICES.register("qmc_lattice")
@dataclasses.dataclass(frozen=True)
class QMCLattice(QMC):
  """Korobov lattice, shifted: `QMC` with ``sequence="lattice"``.

  Args:
    multiplier: as for `QMC`.

  Raises:
    ValueError: as for `QMC`.

  References:
    Avron et al. 2016, section 3 (1412.8293); see `QMC`.

  Example:
    >>> QMCLattice().info.name
    'qmc_lattice'
  """

  sequence: str = dataclasses.field(default="lattice", init=False)
  scrambling: str = dataclasses.field(default="shift", init=False)

  name: ClassVar[str] = "qmc_lattice"


@WEIGHT_MATRICES.register("qmc_halton")
@dataclasses.dataclass(frozen=True)
class QMCHalton(QMC):
  """Halton points, shifted: `QMC` with ``sequence="halton"``.

  It has no options: `sequence` and `scrambling` ("shift") are fixed.

  References:
    Avron et al. 2016, section 3 (1412.8293); see `QMC`.

  Example:
    >>> QMCHalton().info.name
    'qmc_halton'
  """

  sequence: str = dataclasses.field(default="halton", init=False)
  scrambling: str = dataclasses.field(default="shift", init=False)
  multiplier: str = dataclasses.field(default="best", init=False)

  name: ClassVar[str] = "qmc_halton"
