"""Rows from learnable networks: a generator and a normalising flow."""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.typing import Array, Params, Projection
from spectraformer_jax.weight_matrices import base, learners, pieces

# A coupling multiplies a coordinate by at most exp(MAX_LOG_SCALE).
MAX_LOG_SCALE = 1.5


def init_perceptron(rng: Array, widths: tuple[int, ...]) -> Params:
  """Returns parameters of a perceptron whose output is zero for every input.

  The last layer starts at zero, the others with zero biases and Gaussian
  kernels of variance 1 / fan-in. So the first training step changes the last
  layer only; the layers before it have a gradient from the second step on.

  Args:
    rng: PRNG key.
    widths: numbers of units of the input, the hidden layers and the output.

  Returns:
    ``{"layer_0": {"kernel": [in, out], "bias": [out]}, ...}`` float32.

  Example:
    >>> sorted(init_perceptron(jax.random.key(0), (3, 8, 2)))
    ['layer_0', 'layer_1']
  """
  params = {}
  last = len(widths) - 2
  for i, layer_rng in enumerate(jax.random.split(rng, last + 1)):
    shape = widths[i : i + 2]
    kernel = jnp.zeros(shape, jnp.float32)
    if i < last:
      kernel = pieces.normal(layer_rng, shape) / jnp.sqrt(float(shape[0]))
    params[f"layer_{i}"] = {
      "kernel": kernel,
      "bias": jnp.zeros(shape[1:], jnp.float32),
    }
  return params


def apply_perceptron(params: Params, x: Array) -> Array:
  """Applies the perceptron: GELU between layers, the last layer linear.

  Args:
    params: from `init_perceptron`.
    x: ``[..., in]`` float32.

  Returns:
    ``[..., out]`` float32.

  Example:
    >>> params = init_perceptron(jax.random.key(0), (3, 8, 2))
    >>> apply_perceptron(params, jnp.ones((5, 3))).tolist()[0]
    [0.0, 0.0]
  """
  for i in range(len(params)):
    if i:
      x = jax.nn.gelu(x)
    layer = params[f"layer_{i}"]
    bias = jnp.expand_dims(layer["bias"], tuple(range(x.ndim - 1)))
    x = jnp.matmul(x, layer["kernel"], precision="highest") + bias
  return x


@base.WEIGHT_MATRICES.register("generator")
@dataclasses.dataclass(frozen=True)
class Generator(learners.Learner):
  r"""Rows from a generator network (deep generative model, DGM).

  .. math::
    w_m = \epsilon_m + \mathrm{MLP}_\theta(\epsilon_m)

  The MLP has GELU between layers and a linear output that starts at zero, so W
  starts as the noise. Each row depends on its own noise only. Unlike the
  published network, this one has no batch statistics and no tanh at its output:
  a tanh bounds the frequencies, which then cannot have the law N(0, I). The
  learnt law need not be symmetric. A trigonometric map estimates the real part
  of its characteristic function; a positive map estimates a function of x + y
  whose values at x + y and -(x + y) may differ.

  Args:
    base: as for `Learner`.
    num_hidden: number of hidden layers.
    hidden_factor: width of each hidden layer, in units of head_dim.

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

  facts = learners.learner_facts(
    name="generator",
    source="Chowdhury et al. 2021 (2110.08323), generative RKS",
    summary="noise plus the output of a small network for it",
    good_for="kernels without a formula; trigonometric maps first",
    cost="as the base; a network on M rows at every step",
    variance="at the start as the base",
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive_int("num_hidden", self.num_hidden)
    check_positive_int("hidden_factor", self.hidden_factor)

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    hidden = (self.hidden_factor * head_dim,) * self.num_hidden
    return init_perceptron(rng, (head_dim, *hidden, head_dim))

  @override
  def transform(self, params: Params, noise: Array) -> Array:
    return noise + apply_perceptron(params, noise)


@base.WEIGHT_MATRICES.register("flow")
@dataclasses.dataclass(frozen=True)
class Flow(learners.Learner):
  r"""Rows from a normalising flow (invertible neural network, INN).

  .. math::
    (\ell, t) = \mathrm{MLP}(w_A), \quad
    w_B \leftarrow w_B \odot e^{\ell} + t

  In each affine coupling one half A of the coordinates decides how the other
  half B is scaled and shifted. The halves swap roles after each coupling;
  :math:`\ell` is clipped smoothly to (-1.5, 1.5).
  The networks start at zero, so W starts as the noise. Unlike "generator", the
  transformation is invertible and the density of the rows is known: see
  `inverse` and `kl`.

  Args:
    base: as for `Learner`.
    num_couplings: number of couplings; 2 to 4 are usual.
    hidden_factor: width of the hidden layer of each coupling, in units of
      head_dim.

  Raises:
    ValueError: `num_couplings` or `hidden_factor` is not a positive integer;
      unknown `base`. When built: head_dim below 2.

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

  facts = learners.learner_facts(
    name="flow",
    source="Dinh et al. 2017 (1605.08803), section 3.2",
    summary="affine couplings of the noise",
    good_for="kernels without a formula, with a known density",
    cost="as the base; num_couplings networks on M rows at every step",
    variance="at the start as the base",
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    check_positive_int("num_couplings", self.num_couplings)
    check_positive_int("hidden_factor", self.hidden_factor)

  def _info(self) -> base.WeightMatrixInfo:
    info = super()._info()
    constraint = f"{info.constraint}; head_dim >= 2"
    return dataclasses.replace(info, constraint=constraint)

  info = base.info_from_options(_info)

  @override
  def check(self, num_rows: int, head_dim: int) -> None:
    super().check(num_rows, head_dim)
    if head_dim < 2:
      raise ValueError(
        f"weight matrix 'flow' needs head_dim >= 2, got head_dim={head_dim}: "
        "one coordinate cannot be halved; use 'bbq'."
      )

  @override
  def init(self, rng: Array, num_rows: int, head_dim: int) -> Params:
    params = {}
    rngs = jax.random.split(rng, self.num_couplings)
    for i, coupling_rng in enumerate(rngs):
      changed = _split(i, head_dim)[1]
      size = changed.stop - changed.start
      widths = (head_dim - size, self.hidden_factor * head_dim, 2 * size)
      params[f"coupling_{i}"] = init_perceptron(coupling_rng, widths)
    return params

  @override
  def transform(self, params: Params, noise: Array) -> Array:
    return self.forward(params, noise)[0]

  def forward(self, params: Params, noise: Array) -> tuple[Array, Array]:
    """Returns rows ``[M, H]``, log-determinants of their Jacobians ``[M]``."""
    w, log_det = noise, jnp.zeros(noise.shape[:1], noise.dtype)
    for i in range(self.num_couplings):
      changed, log_scale, shift = self._coupling(params, i, w)
      w = w.at[:, changed].set(w[:, changed] * jnp.exp(log_scale) + shift)
      log_det = log_det + jnp.sum(log_scale, axis=-1)
    return w, log_det

  def inverse(self, params: Params, rows: Array) -> Array:
    """Returns the noise ``[M, H]`` that `forward` maps to rows ``[M, H]``."""
    w = rows
    for i in reversed(range(self.num_couplings)):
      changed, log_scale, shift = self._coupling(params, i, w)
      w = w.at[:, changed].set((w[:, changed] - shift) * jnp.exp(-log_scale))
    return w

  def kl(self, params: Params, projection: Projection) -> Array:
    """Estimates the KL divergence of the law of the rows from N(0, I).

    The estimate is the mean over rows of ``log q(w) - log N(w; 0, I)``, where q
    is the density of the rows: unbiased, and zero at the start. A training loss
    can add about 1e-3 times this number to stay near the kernel for which the
    component was designed.

    Args:
      params: of one head.
      projection: of one head: leaf "w" ``[M, H]``.

    Returns:
      A scalar, float32.
    """
    noise = learners.noise_of(projection)
    w, log_det = self.forward(params, noise)
    half_square = 0.5 * jnp.sum(jnp.square(w) - jnp.square(noise), axis=-1)
    return jnp.mean(half_square - log_det)

  def _coupling(
    self, params: Params, i: int, w: Array
  ) -> tuple[slice, Array, Array]:
    """Returns the coordinates that coupling i changes, log-scales, shifts."""
    unchanged, changed = _split(i, w.shape[-1])
    out = apply_perceptron(params[f"coupling_{i}"], w[:, unchanged])
    raw, shift = jnp.split(out, 2, axis=-1)
    log_scale = learners.soft_clip(raw, -MAX_LOG_SCALE, MAX_LOG_SCALE)
    return changed, log_scale, shift


def _split(i: int, head_dim: int) -> tuple[slice, slice]:
  """Returns the coordinates that coupling i keeps and those it changes."""
  first, second = slice(0, head_dim // 2), slice(head_dim // 2, head_dim)
  return (first, second) if i % 2 == 0 else (second, first)
