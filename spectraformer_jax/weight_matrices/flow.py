"""Rows through an invertible network."""

import dataclasses

import jax
import jax.numpy as jnp

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.typing import Array, Params, Projection
from spectraformer_jax.weight_matrices.base import WEIGHT_MATRICES
from spectraformer_jax.weight_matrices.learners import (
  Learner,
  noise_of,
  soft_clip,
)
from spectraformer_jax.weight_matrices.perceptron import (
  apply_perceptron,
  init_perceptron,
)

# A coupling scales by at most exp of this.
MAX_LOG_SCALE = 1.5


@WEIGHT_MATRICES.register("flow")
@dataclasses.dataclass(frozen=True)
class Flow(Learner):
  r"""Rows from a normalising flow (invertible neural network, INN).

  .. math::
    (\ell, t) = \mathrm{MLP}(w_A), \quad
    w_B \leftarrow w_B \odot e^{\ell} + t

  Affine couplings of the two halves A and B of the coordinates, which take
  turns; :math:`\ell` is kept within 1.5 of 0. The networks start at zero, so
  that W starts as the noise. Unlike that of "generator", the map is invertible
  and its density is known: see `inverse` and `kl`.

  Args:
    base: see `Learner`.
    num_couplings: couplings in a row; 2 to 4 are usual.
    hidden_factor: width of the hidden layer of each, in units of head_dim.

  Raises:
    ValueError: `num_couplings` or `hidden_factor` is not a positive integer;
      unknown `base`; when built, head_dim below 2.

  References:
    Dinh, Sohl-Dickstein and Bengio, Density Estimation Using Real NVP, 2017
    (1605.08803), section 3.2.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "flow", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6)
    >>> sorted(v.params["rows"])
    ['coupling_0', 'coupling_1', 'coupling_2', 'coupling_3']
  """

  num_couplings: int = 4
  hidden_factor: int = 2

  def __post_init__(self):
    super().__post_init__()
    check_positive_int("num_couplings", self.num_couplings)
    check_positive_int("hidden_factor", self.hidden_factor)

  @property
  def info(self):
    """Facts; marginals are those of the base."""
    return self.learner_info(
      name="flow",
      source="Dinh et al. 2017 (1605.08803), section 3.2",
      summary="affine couplings of the noise",
      good_for="kernels without a formula, with a known density",
      constraint=f"{self.base_matrix.info.constraint}; head_dim >= 2",
      cost="that of the base; num_couplings networks on M rows at every step",
      variance="at the start that of the base",
    )

  def check(self, num_rows, head_dim):
    """See `WeightMatrix.check`."""
    super().check(num_rows, head_dim)
    if head_dim < 2:
      raise ValueError(
        f"weight matrix 'flow' needs head_dim >= 2, got head_dim={head_dim}: "
        "one coordinate cannot be halved; use 'bbq'."
      )

  def init(self, rng, num_rows, head_dim):
    """See `WeightMatrix.init`."""
    del num_rows
    params = {}
    rngs = jax.random.split(rng, self.num_couplings)
    for i, coupling_rng in enumerate(rngs):
      moved = _split(i, head_dim)[1]
      size = moved.stop - moved.start
      widths = (head_dim - size, self.hidden_factor * head_dim, 2 * size)
      params[f"coupling_{i}"] = init_perceptron(coupling_rng, widths)
    return params

  def transform(self, params, noise):
    """See `Learner.transform`."""
    return self.forward(params, noise)[0]

  def forward(self, params: Params, noise: Array) -> tuple[Array, Array]:
    """Rows ``[M, H]`` and the log-determinants ``[M]`` of their Jacobians."""
    w, log_det = noise, jnp.zeros(noise.shape[:1], noise.dtype)
    for i in range(self.num_couplings):
      moved, log_scale, shift = self._coupling(params, i, w)
      w = w.at[:, moved].set(w[:, moved] * jnp.exp(log_scale) + shift)
      log_det = log_det + jnp.sum(log_scale, axis=-1)
    return w, log_det

  def inverse(self, params: Params, rows: Array) -> Array:
    """The noise ``[M, H]`` that makes these rows ``[M, H]``."""
    w = rows
    for i in reversed(range(self.num_couplings)):
      moved, log_scale, shift = self._coupling(params, i, w)
      w = w.at[:, moved].set((w[:, moved] - shift) * jnp.exp(-log_scale))
    return w

  def kl(self, params: Params, projection: Projection) -> Array:
    """KL divergence of the rows' law from N(0, I), estimated from the rows.

    The mean over rows of ``log q(w) - log N(w; 0, I)``: unbiased, zero at the
    start. A training loss may add it, times about 1e-3, to stay near the kernel
    that the component is made for.

    Args:
      params: of one head.
      projection: of one head: leaf "w" ``[M, H]``.

    Returns:
      A scalar, float32.
    """
    noise = noise_of(projection)
    w, log_det = self.forward(params, noise)
    half_square = 0.5 * jnp.sum(jnp.square(w) - jnp.square(noise), axis=-1)
    return jnp.mean(half_square - log_det)

  def _coupling(self, params, i, w):
    """What coupling i moves, and by how much: it reads the other half alone."""
    kept, moved = _split(i, w.shape[-1])
    out = apply_perceptron(params[f"coupling_{i}"], w[:, kept])
    raw, shift = jnp.split(out, 2, axis=-1)
    return moved, soft_clip(raw, -MAX_LOG_SCALE, MAX_LOG_SCALE), shift


def _split(i: int, head_dim: int) -> tuple[slice, slice]:
  """The coordinates that coupling i keeps, and those it moves."""
  halves = slice(0, head_dim // 2), slice(head_dim // 2, head_dim)
  return halves if i % 2 == 0 else halves[::-1]
