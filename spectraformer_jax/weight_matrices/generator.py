"""Rows made by a neural network."""

import dataclasses

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.weight_matrices.base import WEIGHT_MATRICES
from spectraformer_jax.weight_matrices.learners import Learner
from spectraformer_jax.weight_matrices.perceptron import (
  apply_perceptron,
  init_perceptron,
)


@WEIGHT_MATRICES.register("generator")
@dataclasses.dataclass(frozen=True)
class Generator(Learner):
  r"""Rows from a generator network (deep generative model, DGM).

  .. math::
    w_m = \epsilon_m + \mathrm{MLP}_\theta(\epsilon_m)

  GELU between layers, a linear output that starts at zero: W starts as the
  noise. Each row is made from its own noise alone, without batch statistics and
  without a bound on the frequencies, unlike the published form, whose tanh
  output cannot be N(0, I). The law need not stay symmetric; a trigonometric map
  takes its real part, a positive one estimates a kernel of x + y that differs
  at -x - y.

  Args:
    base: see `Learner`.
    num_hidden: hidden layers.
    hidden_factor: width of each, in units of head_dim.

  Raises:
    ValueError: `num_hidden` or `hidden_factor` is not a positive integer;
      unknown `base`.

  References:
    Chowdhury, Solomou, Dubey and Sachan, On Learning the Transformer Kernel,
    2021 (2110.08323), generative RKS.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "generator", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=6)
    >>> layers = v.params["rows"]
    >>> [layers[name]["kernel"].shape for name in sorted(layers)]
    [(1, 6, 12), (1, 12, 12), (1, 12, 6)]
  """

  num_hidden: int = 2
  hidden_factor: int = 2

  def __post_init__(self):
    super().__post_init__()
    check_positive_int("num_hidden", self.num_hidden)
    check_positive_int("hidden_factor", self.hidden_factor)

  @property
  def info(self):
    """Facts; marginals are those of the base."""
    return self.learner_info(
      name="generator",
      source="Chowdhury et al. 2021 (2110.08323), generative RKS",
      summary="noise plus a small network of it",
      good_for="kernels without a formula; trigonometric maps first",
      cost="that of the base; a network on M rows at every step",
      variance="at the start that of the base",
    )

  def init(self, rng, num_rows, head_dim):
    """See `WeightMatrix.init`."""
    del num_rows
    hidden = (self.hidden_factor * head_dim,) * self.num_hidden
    return init_perceptron(rng, (head_dim, *hidden, head_dim))

  def transform(self, params, noise):
    """See `Learner.transform`."""
    return noise + apply_perceptron(params, noise)
