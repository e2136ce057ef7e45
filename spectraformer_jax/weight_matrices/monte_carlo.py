"""Independent rows: plain, antithetic, importance-weighted and sparse."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.typing import Array, Projection
from spectraformer_jax.weight_matrices import base, pieces
from spectraformer_jax.weight_matrices.row_laws import ENTRY_LAWS, RowLaw


@base.WEIGHT_MATRICES.register("iid")
@dataclasses.dataclass(frozen=True)
class IID(base.WeightMatrix):
  """Independent rows of the component's row law: plain Monte Carlo.

  Every component is unbiased. Other matrices state their variance as a ratio to
  the variance of this matrix, which is that of one row divided by M.

  References:
    Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007,
    Algorithm 1.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "iid", num_features=8)
    >>> fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"].shape
    (1, 8, 4)
  """

  info = base.WeightMatrixInfo(
    name="iid",
    group="monte carlo",
    marginals="exact",
    source="Rahimi and Recht 2007, Algorithm 1",
    summary="independent rows",
    good_for="a baseline for every component; any row law",
    row_laws=ENTRY_LAWS,
    cost="M H draws",
    variance="1 (the reference)",
  )

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    return {"w": law.sample(rng, (num_rows, head_dim))}


@base.WEIGHT_MATRICES.register("antithetic")
@dataclasses.dataclass(frozen=True)
class Antithetic(base.GaussianRows):
  r"""Independent Gaussian rows and their negatives.

  .. math::
    W = (G; -G), \quad G_{mj} \sim N(0, 1)

  The rows of G are independent; if M is odd, the negative of the last row is
  left out. Each row alone is N(0, I). The variance, divided by that of
  independent rows, is exactly :math:`1 - e^{-|x + y|^2}` for positive maps and
  exactly 2 for trigonometric ones (a cosine is even, so half of the rows repeat
  the other half).

  References:
    Antithetic variates (Hammersley and Morton, 1956) on Rahimi and Recht, 2007.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "antithetic", num_features=8)
    >>> w = fm.init(jax.random.key(0), head_dim=4).projection["rows"]["w"][0]
    >>> bool((w[:4] == -w[4:]).all())
    True
  """

  info = base.WeightMatrixInfo(
    name="antithetic",
    group="monte carlo",
    marginals="exact",
    source="antithetic variates on Rahimi and Recht 2007",
    summary="independent rows and their negatives",
    good_for="positive maps at small |x + y|; never maps with both signs of a "
    "row (trigonometric, hyperbolic), which lose half of the rows",
    antithetic=True,
    constraint="any num_features (even preferred), any head_dim",
    cost="M H / 2 draws",
    variance="trig 2, pos 1 - exp(-|x+y|^2)",
  )

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    half = pieces.normal(rng, (-(-num_rows // 2), head_dim))
    return pieces.antithetic_rows(half, num_rows)


@base.WEIGHT_MATRICES.register("importance")
@dataclasses.dataclass(frozen=True)
class Importance(base.WeightMatrix):
  r"""Importance sampling: wider or narrower rows, with likelihood ratios.

  .. math::
    w_m \sim N(0, \sigma^2 I), \quad
    \log (M a_m) = H \log \sigma - \tfrac12 |w_m|^2 (1 - \sigma^{-2})

  The row weights :math:`a_m` make every component unbiased. Their variance is
  exponential in H: at H = 32, sigma = 1.1 increases the variance of
  trigonometric maps by a factor of 1.6 to 6. It lowers the variance of positive
  maps at large :math:`|x + y|` only. Component "oprf" samples with
  :math:`\sigma^2 = 1 - 4 A` and chooses A for the data: use "oprf" instead of
  this matrix, not with it.

  Args:
    sigma: scale of the rows, above 1/sqrt(2); at 1/sqrt(2) or below, the second
      moment of the weights is infinite.

  Raises:
    ValueError: sigma too small, or not finite.

  References:
    Owen, Monte Carlo Theory, Methods and Examples, 2013, section 9.1.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "importance", num_features=8)
    >>> rows = fm.init(jax.random.key(0), head_dim=4).projection["rows"]
    >>> rows["log_weight"].shape
    (1, 8)
  """

  sigma: float = 1.1

  info = base.WeightMatrixInfo(
    name="importance",
    group="monte carlo",
    marginals="weighted",
    source="Owen 2013, section 9.1",
    summary="rows of N(0, sigma^2 I) with likelihood-ratio weights",
    good_for="positive maps at large |x + y| and small H",
    cost="M H draws",
    variance="trig 1.8, pos 0.75 at scale 0.2, sigma=1.1, H=32",
    weighted=True,
  )

  def __post_init__(self) -> None:
    if not math.sqrt(0.5) < self.sigma < math.inf:
      raise ValueError(
        f"sigma must be finite and above 1/sqrt(2), got {self.sigma!r}."
      )

  @override
  def draw(
    self, rng: Array, num_rows: int, head_dim: int, law: RowLaw
  ) -> Projection:
    w = self.sigma * pieces.normal(rng, (num_rows, head_dim))
    half_square = 0.5 * jnp.sum(jnp.square(w), axis=-1)
    log_ratio = half_square * (1.0 - self.sigma**-2)
    return {"w": w, "log_weight": head_dim * math.log(self.sigma) - log_ratio}


@base.WEIGHT_MATRICES.register("sparse")
@dataclasses.dataclass(frozen=True)
class Sparse(base.GaussianRows):
  r"""Sparse rows: Gaussian on q random coordinates, zero elsewhere.

  .. math::
    W_{mj} = \sqrt{H / q}\, g_{mj}\, [j \in S_m], \quad
    S_m \text{ a uniform } q\text{-subset}, \quad g \sim N(0, 1)

  Mean and covariance are those of N(0, I), but rows are not Gaussian: the mean
  of trigonometric estimates is the mean over q-subsets S of
  :math:`\exp(-\tfrac{H}{2q} |z_S|^2)`, z = x - y, which is too large (by
  0.5 for axis-aligned inputs at q = 4, H = 32). The variance of positive maps
  is many hundred times that of independent rows at scale 0.2. Sparse rows are
  not faster on an accelerator.

  Args:
    nonzeros: q, the number of nonzero entries of a row (before mixing).
    hadamard: mix the coordinates by random signs and a Hadamard matrix and draw
      chi norms. Then the accuracy is that of independent rows on most inputs,
      but on axis-aligned and constant inputs the bias is up to 0.07 (at
      |x - y|^2 = 2).

  Raises:
    ValueError: `nonzeros` is not a positive integer. When built: it is larger
      than head_dim (if `hadamard`, than the next power of two).

  References:
    Hashemi, Schaeffer, Shi, Topcu, Tran and Ward, Generalization Bounds for
    Sparse Random Feature Expansions, 2021, definition 2 (2103.03191).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "sparse", num_features=3)
    >>> w = fm.init(jax.random.key(0), head_dim=8).projection["rows"]["w"][0]
    >>> (w != 0).sum(axis=1).tolist()
    [4, 4, 4]
  """

  nonzeros: int = 4
  hadamard: bool = False

  info = base.WeightMatrixInfo(
    name="sparse",
    group="monte carlo",
    marginals="approximate",
    source="Hashemi et al. 2021, definition 2",
    summary="Gaussian on a few random coordinates, zero elsewhere",
    good_for="kernels that depend on few coordinates; no others",
    constraint="head_dim >= nonzeros (4 unless set)",
    cost="M selections of q among H",
    variance="trig 1.5 to 3, pos hundreds at scale 0.2, H=32, q=4",
  )

  def __post_init__(self) -> None:
    check_positive_int("nonzeros", self.nonzeros)

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    size = self._size(head_dim)
    if self.nonzeros > size:
      raise ValueError(
        f"weight matrix 'sparse' needs nonzeros <= {size}, got "
        f"nonzeros={self.nonzeros} at head_dim={head_dim}: use at most {size}."
      )

  @override
  def draw_rows(self, rng: Array, num_rows: int, head_dim: int) -> Array:
    row_rng, sign_rng, norm_rng = jax.random.split(rng, 3)
    size = self._size(head_dim)
    rows = _sparse_rows(row_rng, num_rows, size, self.nonzeros)
    if not self.hadamard:
      return math.sqrt(head_dim / self.nonzeros) * rows
    # Signs come after the Hadamard product; before it they would not change the
    # law of the rows, since that of the entries is symmetric.
    signs = pieces.random_signs(sign_rng, (1, head_dim))
    table = pieces.hadamard(size)[:, :head_dim]
    mixed = jnp.matmul(rows, table, precision="highest")
    norms = pieces.chi_norms(norm_rng, num_rows, head_dim)
    return pieces.set_norms(mixed, norms) * signs

  def _size(self, head_dim: int) -> int:
    """Returns the number of coordinates of a row before mixing."""
    return pieces.next_power_of_two(head_dim) if self.hadamard else head_dim


def _sparse_rows(rng: Array, num_rows: int, size: int, nonzeros: int) -> Array:
  """Draws rows ``[M, size]``: N(0, 1) at `nonzeros` random places, else 0."""
  place_rng, value_rng = jax.random.split(rng)
  scores = jax.random.bits(place_rng, (num_rows, size), jnp.uint32)
  _, places = jax.lax.top_k(scores, nonzeros)
  values = pieces.normal(value_rng, (num_rows, nonzeros))
  rows = jnp.arange(num_rows)[:, None]
  return jnp.zeros((num_rows, size), jnp.float32).at[rows, places].set(values)
