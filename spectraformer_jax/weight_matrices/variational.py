"""Rows whose law depends on the sequence they serve."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array, Params, WeightSample
from spectraformer_jax.weight_matrices.base import WEIGHT_MATRICES
from spectraformer_jax.weight_matrices.learners import (
  Learner,
  check_log_sigma_range,
  noise_of,
  soft_clip,
)
from spectraformer_jax.weight_matrices.perceptron import (
  apply_perceptron,
  init_perceptron,
)

CONTEXTS = ("keys", "learned")


@WEIGHT_MATRICES.register("variational")
@dataclasses.dataclass(frozen=True)
class Variational(Learner):
  r"""Gaussian rows whose mean and scale a network reads off the sequence.

  .. math::
    w_m = \mu(c) + \sigma(c) \odot \epsilon_m, \quad
    (\mu, \log \sigma) = \mathrm{MLP}(c)

  The network ends in zeros at the start, so that W starts as the noise. The
  context c is the mean of a sequence's visible keys, without gradient: each
  example has its own W ``[B, N, M, H]``, which costs memory. Attention computes
  it where it is not causal (`FeatureMap.calibrate` elsewhere, as leaf "rows" of
  the stats); causal attention refuses, since the mean would see the future, and
  takes ``context="learned"`` or explicit stats.

  Args:
    base: see `Learner`.
    context: "keys", or "learned": a parameter, the same for all sequences.
    hidden_factor: width of the hidden layer, in units of head_dim.
    min_log_sigma: see `GMM`.
    max_log_sigma: see `GMM`.

  Raises:
    ValueError: unknown `context` or `base`; `hidden_factor` is not a positive
      integer; the bounds are not on either side of 0.

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

  def __post_init__(self):
    super().__post_init__()
    if self.context not in CONTEXTS:
      raise ValueError(
        f"Unknown context {self.context!r}.{nearest(self.context, CONTEXTS)}"
      )
    check_positive_int("hidden_factor", self.hidden_factor)
    check_log_sigma_range(self.min_log_sigma, self.max_log_sigma)

  @property
  def info(self):
    """Facts; marginals are those of the base."""
    return self.learner_info(
      name="variational",
      source="Zhen et al. 2020 (2006.06707), section 3",
      summary="Gaussian rows conditioned on the mean of the keys",
      good_for="kernels that change with the sequence; not causal ones",
      cost="that of the base; M H products per example at every step",
      variance="at the start that of the base",
    )

  @property
  def needs_stats(self):
    """See `WeightMatrix.needs_stats`."""
    return self.context == "keys"

  def init(self, rng, num_rows, head_dim):
    """See `WeightMatrix.init`."""
    del num_rows
    network_rng, context_rng = jax.random.split(rng)
    widths = (head_dim, self.hidden_factor * head_dim, 2 * head_dim)
    params = {"network": init_perceptron(network_rng, widths)}
    if self.context == "learned":
      params["context"] = jax.random.normal(
        context_rng, (head_dim,), dtype=jnp.float32
      )
    return params

  def calibrate(self, params, key, key_mask):
    """See `WeightMatrix.calibrate`: the mean key ``[H]``."""
    del params
    if self.context == "learned":
      return ()
    if key_mask is None:
      return jnp.mean(key, axis=0)
    total = jnp.sum(jnp.where(key_mask[:, None], key, 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(key_mask), 1).astype(key.dtype)

  def rows(self, params, projection, context=()):
    """See `WeightMatrix.rows`."""
    noise = noise_of(projection)
    if isinstance(context, tuple):
      # Shapes alone are asked for, unless the context is a parameter.
      context = params.get("context", jnp.zeros_like(noise[0]))
    mu, log_sigma = self.mean_and_log_sigma(params, context)
    return WeightSample(mu[None, :] + jnp.exp(log_sigma)[None, :] * noise)

  def kl(self, params: Params, context: Any = ()) -> Array:
    r"""KL divergence of the rows' law from N(0, I): what keeps it near.

    .. math::
      \tfrac12 \sum_j (\sigma_j^2 + \mu_j^2 - 1 - 2 \log \sigma_j)

    Zero at the start. A training loss adds its mean over examples and heads,
    times 1e-3 to 1e-2.

    Args:
      params: of one head.
      context: of that head, ``[..., H]``; leave it out if it is learnt.

    Returns:
      ``[...]`` float32.
    """
    if isinstance(context, tuple):
      context = params["context"]
    mu, log_sigma = self.mean_and_log_sigma(params, context)
    terms = jnp.expm1(2.0 * log_sigma) + jnp.square(mu) - 2.0 * log_sigma
    return 0.5 * jnp.sum(terms, axis=-1)

  def mean_and_log_sigma(self, params, context):
    """Of the rows, for contexts ``[..., H]``: two of ``[..., H]``."""
    out = apply_perceptron(params["network"], context)
    mu, raw = jnp.split(out, 2, axis=-1)
    return mu, soft_clip(raw, self.min_log_sigma, self.max_log_sigma)
