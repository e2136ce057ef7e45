"""Learnable Gaussian rows: a mixture, or one with a full covariance."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.typing import WeightSample
from spectraformer_jax.weight_matrices.base import WEIGHT_MATRICES
from spectraformer_jax.weight_matrices.learners import (
  Learner,
  check_log_sigma_range,
  inverse_softplus,
  noise_of,
  soft_clip,
)

# Spread of the means at the start, where there is more than one component.
MEAN_SPREAD = 0.1


@WEIGHT_MATRICES.register("gmm")
@dataclasses.dataclass(frozen=True)
class GMM(Learner):
  r"""A learnable mixture of Gaussians with diagonal covariances.

  .. math::
    w_m = \mu_c + \sigma_c \odot \epsilon_m, \quad
    a_m = \pi_c / R_c, \quad \pi = \mathrm{softmax}(l)

  The rows are shared out evenly: component c has :math:`R_c` of them, M / C or
  one more. Its share :math:`\pi_c` enters as a row weight, which has a gradient
  and needs no sampling of components. With z = x - y and v = x + y the maps
  estimate

  .. math::
    \sum_c \pi_c \cos(\mu_c \cdot z) e^{-|\sigma_c \odot z|^2 / 2}
    \quad \text{(trigonometric, Gaussian)}, \qquad
    e^{-(|x|^2 + |y|^2)/2} \sum_c \pi_c
    e^{\mu_c \cdot v + |\sigma_c \odot v|^2 / 2} \quad \text{(positive)}

  At the start :math:`\pi_c = 1/C`; one component has mean 0 and variance 1,
  several have means of N(0, 0.01 I), to differ, and variances of 0.99, so that
  over the draw of the parameters each row is exactly N(0, I).

  Args:
    base: see `Learner`.
    num_components: C.
    min_log_sigma: lower bound of log sigma, below 0.
    max_log_sigma: upper bound of log sigma, above 0: a positive kernel grows as
      the exponential of sigma squared. Both are approached, never reached, so
      that no gradient ends there.

  Raises:
    ValueError: `num_components` is not a positive integer; the bounds are not
      on either side of 0; unknown `base`; when built, fewer rows than
      components.

  References:
    Chowdhury, Solomou, Dubey and Sachan, On Learning the Transformer Kernel,
    2021 (2110.08323), GMM-RKS. There a mixture of C attention outputs; here of
    kernels.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "gmm", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6)
    >>> {name: leaf.shape for name, leaf in v.params["rows"].items()}
    {'log_sigma': (1, 4, 6), 'logits': (1, 4), 'mu': (1, 4, 6)}
  """

  num_components: int = 4
  min_log_sigma: float = -3.0
  max_log_sigma: float = 1.0

  def __post_init__(self):
    super().__post_init__()
    check_positive_int("num_components", self.num_components)
    check_log_sigma_range(self.min_log_sigma, self.max_log_sigma)

  @property
  def info(self):
    """Facts; marginals are those of the base."""
    return self.learner_info(
      name="gmm",
      source="Chowdhury et al. 2021 (2110.08323), GMM-RKS",
      summary="learnable mixture of diagonal Gaussians, one weight each",
      good_for="learning length scales and periods per coordinate",
      constraint=f"{self.base_matrix.info.constraint}; num_features >= "
      f"num_components = {self.num_components}",
      cost="that of the base; M H products at every step",
      variance="at the start that of the base, nearly",
      weighted=True,
    )

  def check(self, num_rows, head_dim):
    """See `WeightMatrix.check`."""
    super().check(num_rows, head_dim)
    if num_rows < self.num_components:
      raise ValueError(
        "weight matrix 'gmm' needs num_features >= num_components, got "
        f"num_features={num_rows} and num_components={self.num_components}."
      )

  def init(self, rng, num_rows, head_dim):
    """See `WeightMatrix.init`; one component needs no logits."""
    del num_rows
    shape = (self.num_components, head_dim)
    if self.num_components == 1:
      zeros = jnp.zeros(shape, jnp.float32)
      return {"mu": zeros, "log_sigma": zeros}
    return {
      "logits": jnp.zeros(shape[:1], jnp.float32),
      "mu": MEAN_SPREAD * jax.random.normal(rng, shape, dtype=jnp.float32),
      "log_sigma": jnp.full(
        shape, 0.5 * math.log1p(-(MEAN_SPREAD**2)), jnp.float32
      ),
    }

  def sigma(self, params):
    """Standard deviations ``[C, H]``."""
    return jnp.exp(
      soft_clip(params["log_sigma"], self.min_log_sigma, self.max_log_sigma)
    )

  def rows(self, params, projection, context=()):
    """See `WeightMatrix.rows`."""
    del context
    noise = noise_of(projection)
    num_rows, components = noise.shape[0], self.num_components
    sizes = np.full(components, num_rows // components)
    sizes[: num_rows % components] += 1
    which = np.repeat(np.arange(components), sizes)
    w = params["mu"][which] + self.sigma(params)[which] * noise
    if components == 1:
      return WeightSample(w)
    log_share = jax.nn.log_softmax(params["logits"])
    log_weight = log_share + np.log(num_rows / sizes).astype(np.float32)
    return WeightSample(w, log_weight[which])


@WEIGHT_MATRICES.register("cov")
@dataclasses.dataclass(frozen=True)
class Cov(Learner):
  r"""Gaussian rows of a learnable covariance.

  .. math::
    W = E L^\top, \quad E\, \hat k = e^{-z^\top L L^\top z / 2}
    \text{ (trigonometric, Gaussian; } z = x - y)

  L is lower triangular with a positive diagonal; the parameters are its lower
  triangle, row by row, the diagonal through softplus. It starts as the
  identity. The same as a learnable linear map of queries and keys before the
  feature map.

  Args:
    base: see `Learner`.

  Raises:
    ValueError: unknown `base`.

  References:
    Chowdhury et al., On Learning the Transformer Kernel, 2021 (2110.08323),
    GMM-RKS with one component, its covariance full as in DARKFormer
    (2603.04127).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "cov", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6)
    >>> v.params["rows"]["lower"].shape  # 6 * 7 / 2
    (1, 21)
  """

  @property
  def info(self):
    """Facts; marginals are those of the base."""
    return self.learner_info(
      name="cov",
      source="Chowdhury et al. 2021 (2110.08323); DARKFormer (2603.04127)",
      summary="Gaussian rows of a learnable full covariance",
      good_for="learning which directions matter; all components",
      cost="that of the base; a product of M x H and H x H at every step",
      variance="at the start that of the base",
    )

  def init(self, rng, num_rows, head_dim):
    """See `WeightMatrix.init`."""
    del rng, num_rows
    row, column = np.tril_indices(head_dim)
    one = inverse_softplus(jnp.float32(1.0))
    return {"lower": jnp.where(row == column, one, 0.0)}

  def factor(self, params, head_dim):
    """L ``[H, H]``."""
    row, column = np.tril_indices(head_dim)
    lower = params["lower"]
    entries = jnp.where(row == column, jax.nn.softplus(lower), lower)
    return (
      jnp.zeros((head_dim, head_dim), entries.dtype)
      .at[row, column]
      .set(entries)
    )

  def transform(self, params, noise):
    """See `Learner.transform`."""
    factor = self.factor(params, noise.shape[-1])
    return jnp.matmul(noise, factor.T, precision="highest")
