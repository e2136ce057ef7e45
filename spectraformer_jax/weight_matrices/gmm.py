"""Learnable Gaussian rows: mixture, full covariance, or dependent on keys."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array, Params, Projection, WeightSample
from spectraformer_jax.weight_matrices import base, learners, networks, pieces

# Standard deviation of the initial means of a mixture of several Gaussians.
MEAN_SPREAD = 0.1
CONTEXTS = ("keys", "learned")


@base.WEIGHT_MATRICES.register("gmm")
@dataclasses.dataclass(frozen=True)
class GMM(learners.Learner):
  r"""A learnable mixture of Gaussians with diagonal covariances.

  .. math::
    w_m = \mu_k + \sigma_k \odot \epsilon_m, \quad
    a_m = \pi_k / R_k, \quad \pi = \mathrm{softmax}(l)

  Each Gaussian k of the mixture has nearly the same number :math:`R_k` of rows:
  floor(M / K) or one more. Its share :math:`\pi_k` enters through the row
  weights :math:`a_m` and so has a gradient, which it would not have if the
  number of rows were sampled. With z = x - y and v = x + y the maps estimate

  .. math::
    \sum_k \pi_k \cos(\mu_k \cdot z) e^{-|\sigma_k \odot z|^2 / 2}
    \quad \text{(trigonometric, Gaussian)}, \qquad
    e^{-(|x|^2 + |y|^2)/2} \sum_k \pi_k
    e^{\mu_k \cdot v + |\sigma_k \odot v|^2 / 2} \quad \text{(positive)}

  At the start :math:`\pi_k = 1/K`. A single Gaussian starts with mean 0 and
  variance 1. Several Gaussians start with different means, drawn from
  N(0, 0.01 I), and variances of 0.99, so that each row is exactly N(0, I) over
  the draw of the parameters.

  Args:
    base: as for `Learner`.
    num_components: K, the number of Gaussians.
    min_log_sigma: lower bound of log sigma, below 0.
    max_log_sigma: upper bound of log sigma, above 0; it limits positive
      kernels, which grow with exp(sigma^2). Log sigma approaches the bounds
      without reaching them, so the gradient never vanishes.

  Raises:
    ValueError: `num_components` is not a positive integer; 0 is not between the
      bounds; unknown `base`. When built: fewer rows than components.

  References:
    Chowdhury, Solomou, Dubey and Sachan, On Learning the Transformer Kernel,
    2021 (2110.08323), GMM-RKS. The paper mixes the outputs of attention; this
    class mixes kernels.

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

  facts = learners.learner_facts(
    name="gmm",
    source="Chowdhury et al. 2021 (2110.08323), GMM-RKS",
    summary="learnable mixture of diagonal Gaussians, with learnable shares",
    good_for="learning length scales and periods per coordinate",
    cost="as the base; M H products at every step",
    variance="at the start nearly as the base",
    weighted=True,
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive_int("num_components", self.num_components)
    learners.check_log_sigma_range(self.min_log_sigma, self.max_log_sigma)

  def _info(self) -> base.WeightMatrixInfo:
    info = super()._info()
    least = f"num_features >= num_components = {self.num_components}"
    return dataclasses.replace(info, constraint=f"{info.constraint}; {least}")

  info = base.info_from_options(_info)

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    super().check(num_rows, head_dim)
    if num_rows < self.num_components:
      raise ValueError(
        "weight matrix 'gmm' needs num_features >= num_components, got "
        f"num_features={num_rows} and num_components={self.num_components}."
      )

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    shape = (self.num_components, head_dim)
    if self.num_components == 1:
      zeros = jnp.zeros(shape, jnp.float32)
      return {"mu": zeros, "log_sigma": zeros}
    log_sigma = 0.5 * math.log1p(-(MEAN_SPREAD**2))
    return {
      "logits": jnp.zeros(shape[:1], jnp.float32),
      "mu": MEAN_SPREAD * pieces.normal(rng, shape),
      "log_sigma": jnp.full(shape, log_sigma, jnp.float32),
    }

  def sigma(self, params: Params) -> Array:
    """Returns the standard deviations ``[K, H]``."""
    bounds = self.min_log_sigma, self.max_log_sigma
    return jnp.exp(learners.soft_clip(params["log_sigma"], *bounds))

  @override
  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    noise = learners.noise_of(projection)
    num_rows, num_gaussians = noise.shape[0], self.num_components
    sizes = np.full(num_gaussians, num_rows // num_gaussians)
    sizes[: num_rows % num_gaussians] += 1
    gaussian_of_row = np.repeat(np.arange(num_gaussians), sizes)
    mu, sigma = params["mu"], self.sigma(params)
    w = mu[gaussian_of_row] + sigma[gaussian_of_row] * noise
    if num_gaussians == 1:
      return WeightSample(w)
    log_share = jax.nn.log_softmax(params["logits"])
    log_weight = log_share + np.log(num_rows / sizes).astype(np.float32)
    return WeightSample(w, log_weight[gaussian_of_row])


@base.WEIGHT_MATRICES.register("cov")
@dataclasses.dataclass(frozen=True)
class Cov(learners.Learner):
  r"""Gaussian rows with a learnable covariance.

  .. math::
    W = E L^\top, \quad E\, \hat k = e^{-z^\top L L^\top z / 2}
    \text{ (trigonometric, Gaussian; } z = x - y)

  E is the noise. L is lower triangular with a positive diagonal and starts as
  the identity. The parameters are its lower triangle, row by row; the diagonal
  goes through softplus. The matrix acts like a learnable linear map of queries
  and keys before the feature map.

  Args:
    base: as for `Learner`.

  Raises:
    ValueError: unknown `base`.

  References:
    Chowdhury et al., On Learning the Transformer Kernel, 2021 (2110.08323),
    GMM-RKS with one component, but with a full covariance as in DARKFormer
    (2603.04127).

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "cov", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6)
    >>> v.params["rows"]["lower"].shape  # 6 * 7 / 2
    (1, 21)
  """

  facts = learners.learner_facts(
    name="cov",
    source="Chowdhury et al. 2021 (2110.08323); DARKFormer (2603.04127)",
    summary="Gaussian rows of a learnable full covariance",
    good_for="learning which directions matter; all components",
    cost="as the base; a product of M x H and H x H at every step",
    variance="at the start as the base",
  )

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    row, column = np.tril_indices(head_dim)
    one = learners.inverse_softplus(jnp.float32(1.0))
    return {"lower": jnp.where(row == column, one, 0.0)}

  def factor(self, params: Params, head_dim: int) -> Array:
    """Returns L ``[H, H]``."""
    row, column = np.tril_indices(head_dim)
    lower = params["lower"]
    entries = jnp.where(row == column, jax.nn.softplus(lower), lower)
    zeros = jnp.zeros((head_dim, head_dim), entries.dtype)
    return zeros.at[row, column].set(entries)

  @override
  def transform(self, params: Params, noise: Array) -> Array:
    factor = self.factor(params, noise.shape[-1])
    return jnp.matmul(noise, factor.T, precision="highest")


@base.WEIGHT_MATRICES.register("variational")
@dataclasses.dataclass(frozen=True)
class Variational(learners.Learner):
  r"""Gaussian rows whose mean and scale a network computes from the sequence.

  .. math::
    w_m = \mu(c) + \sigma(c) \odot \epsilon_m, \quad
    (\mu, \log \sigma) = \mathrm{MLP}(c)

  The last layer of the network starts at zero, so W starts as the noise. The
  context c is the mean of the visible keys of a sequence, without gradient. So
  each of B examples has its own W in each of N heads, ``[B, N, M, H]``, which
  costs memory. Non-causal attention computes the context itself; elsewhere
  `FeatureMap.calibrate` returns it as leaf "rows" of the stats. Causal
  attention raises an error, since the mean depends on future keys; it needs
  ``context="learned"`` or explicit stats.

  Args:
    base: as for `Learner`.
    context: "keys" (their mean), or "learned" (a parameter, the same for all
      sequences).
    hidden_factor: width of the hidden layer, in units of head_dim.
    min_log_sigma: as for `GMM`.
    max_log_sigma: as for `GMM`.

  Raises:
    ValueError: unknown `context` or `base`; `hidden_factor` is not a positive
      integer; 0 is not between the bounds.

  References:
    Zhen et al., Learning to Learn Kernels with Variational Random Features,
    2020 (2006.06707), section 3.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "variational", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6, num_heads=2)
    >>> x = jax.random.normal(jax.random.key(1), (3, 5, 2, 6))
    >>> stats = fm.calibrate(v, x, x)
    >>> kl = jax.vmap(fm.weight_matrix.kl, in_axes=(0, 1))
    >>> kl(v.params["rows"], stats["rows"]).tolist()  # [heads, batch]
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
  """

  context: str = "keys"
  hidden_factor: int = 2
  min_log_sigma: float = -3.0
  max_log_sigma: float = 1.0

  facts = learners.learner_facts(
    name="variational",
    source="Zhen et al. 2020 (2006.06707), section 3",
    summary="Gaussian rows conditioned on the mean of the keys",
    good_for="kernels that change with the sequence; not causal ones",
    cost="as the base; M H products per example at every step",
    variance="at the start as the base",
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    check_choice("context", self.context, CONTEXTS)
    check_positive_int("hidden_factor", self.hidden_factor)
    learners.check_log_sigma_range(self.min_log_sigma, self.max_log_sigma)

  @property
  @override
  def needs_stats(self) -> bool:
    return self.context == "keys"

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    network_rng, context_rng = jax.random.split(rng)
    widths = (head_dim, self.hidden_factor * head_dim, 2 * head_dim)
    params: Params = {"network": networks.init_perceptron(network_rng, widths)}
    if self.context == "learned":
      params["context"] = pieces.normal(context_rng, (head_dim,))
    return params

  @override
  def calibrate(
    self, params: Params, key: Array, key_mask: Array | None
  ) -> Any:
    if self.context == "learned":
      return ()
    if key_mask is None:
      return jnp.mean(key, axis=0)
    total = jnp.sum(jnp.where(key_mask[:, None], key, 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(key_mask), 1).astype(key.dtype)

  @override
  def rows(
    self, params: Params, projection: Projection, context: Any = ()
  ) -> WeightSample:
    noise = learners.noise_of(projection)
    if isinstance(context, tuple):
      # The learnt context, or zeros for callers that only need shapes.
      context = params.get("context", jnp.zeros_like(noise[0]))
    mu, log_sigma = self.mean_and_log_sigma(params, context)
    return WeightSample(mu[None, :] + jnp.exp(log_sigma)[None, :] * noise)

  def kl(self, params: Params, context: Any = ()) -> Array:
    r"""Computes the KL divergence of the law of the rows from N(0, I).

    .. math::
      \tfrac12 \sum_j (\sigma_j^2 + \mu_j^2 - 1 - 2 \log \sigma_j)

    It is zero at the start. To keep the law near N(0, I), a training loss can
    add the mean of this number over examples and heads, times 1e-3 to 1e-2.

    Args:
      params: of one head.
      context: of that head, ``[..., H]``; omit it if the context is learnt.

    Returns:
      ``[...]`` float32.
    """
    if isinstance(context, tuple):
      context = params["context"]
    mu, log_sigma = self.mean_and_log_sigma(params, context)
    terms = jnp.expm1(2.0 * log_sigma) + jnp.square(mu) - 2.0 * log_sigma
    return 0.5 * jnp.sum(terms, axis=-1)

  def mean_and_log_sigma(
    self, params: Params, context: Array
  ) -> tuple[Array, Array]:
    """Returns mean and log sigma of the rows, both of the context's shape."""
    out = networks.apply_perceptron(params["network"], context)
    mu, raw = jnp.split(out, 2, axis=-1)
    return mu, learners.soft_clip(raw, self.min_log_sigma, self.max_log_sigma)
