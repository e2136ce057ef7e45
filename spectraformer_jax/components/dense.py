"""Dense-exponential features whose pre-map scales each coordinate."""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.components.optimal import (
  OptimalPositive,
  logit,
  optimal_rho,
)
from spectraformer_jax.typing import Array, Params, PyTree, Side

# Limits of the scale of a pre-map, within which float32 loses nothing.
MIN_SCALE, MAX_SCALE = 1e-2, 1e2


@dataclasses.dataclass(frozen=True)
class DenseExponential(OptimalPositive):
  r"""Base of the dense-exponential components (DERF).

  Queries are mapped to :math:`x' = G x` and keys to :math:`y' = G^{-T} y`,
  which keeps every :math:`x \cdot y`. The quadratic term in the rows has a
  diagonal A; a rotation of the rows brings any symmetric A to this form.
  Subclasses choose the best G for given moments; the best A then follows in
  closed form, as one number or one per coordinate.

  Parameters are "rho" (:math:`1/(1 - 8A)`, a scalar or ``[H]``) and the two
  maps, "query_map" and "key_map": ``[H]`` if diagonal, else ``[H, H]``. The
  methods that make maps return both in a dictionary.
  """

  @property
  def has_scalar_a(self) -> bool:
    """Whether A is one number for all coordinates."""
    raise NotImplementedError

  def best_maps(self, moments: PyTree) -> Params:
    """Returns the best G for these moments, and its inverse transpose."""
    raise NotImplementedError

  def init_maps(self, head_dim: int) -> Params:
    """Returns the learnable parameters of G = identity."""
    raise NotImplementedError

  def learned_maps(self, params: Params) -> Params:
    """Returns G of these learnable parameters, and its inverse transpose."""
    raise NotImplementedError

  @override
  def pre_map(self, x: Array, side: Side, parameters: Params) -> Array:
    linear = parameters.get(f"{side}_map")
    if linear is None:
      return x
    if linear.ndim == 2:
      return jnp.einsum("...h,gh->...g", x, linear, precision="highest")
    return x * jnp.reshape(linear, (1,) * (x.ndim - 1) + (-1,))

  @override
  def init_params(self, head_dim: int) -> Params:
    start = logit(self.constant(head_dim)["rho"])
    shape = () if self.has_scalar_a else (head_dim,)
    rho_logit = jnp.broadcast_to(start, shape)
    return {"rho_logit": rho_logit, **self.init_maps(head_dim)}

  @override
  def solve(self, moments: PyTree) -> PyTree:
    maps = self.best_maps(moments)
    query_map, key_map = maps["query_map"], maps["key_map"]
    # Mean square of each coordinate of x' + y', over all pairs.
    spread = (
      _mean_product(query_map, moments["query_square"], query_map)
      + _mean_product(key_map, moments["key_square"], key_map)
      + 2.0 * _mean_product(query_map, moments["cross"], key_map)
    )
    # Rounding must not push a mean of squares below zero.
    spread = jnp.maximum(spread, 0.0)
    if self.has_scalar_a:
      rho = optimal_rho(jnp.sum(spread), spread.shape[-1])
    else:
      rho = optimal_rho(spread, 1)
    return {"rho": rho, **maps}

  @override
  def from_params(self, params: Params) -> Params:
    rho = jax.nn.sigmoid(params["rho_logit"])
    return {"rho": rho, **self.learned_maps(params)}


@base.COMPONENTS.register("saderf")
@dataclasses.dataclass(frozen=True)
class SADERF(DenseExponential):
  r"""Simplified asymmetric dense-exponential random features (FAVOR#).

  .. math::
    f(\omega, x) = (1 - 4A)^{H/4}
      \exp(A |\omega|^2 + \sqrt{1 - 4A}\, \omega^\top x' - |x'|^2/2),
    \qquad x'_l = \psi_l x_l \text{ (queries)},\; x_l / \psi_l \text{ (keys)}

  This is OPRF after rescaling each coordinate so that queries and keys have the
  same mean square: :math:`\psi_l = (\overline{y_l^2} /
  \overline{x_l^2})^{1/4}`. A is that of OPRF for the mapped data, or, with
  `per_dimension`, the best one for each coordinate. The Gaussian kernel
  subtracts :math:`|x|^2/2`, of the unmapped x, in the exponent. The second
  moment of one row is

  .. math::
    \prod_l (1-4a_l)(1-8a_l)^{-1/2} \exp\Big(\sum_l
      \tfrac{2(1-4a_l)}{1-8a_l} (x'_l + y'_l)^2 - |x'|^2 - |y'|^2\Big)

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of psi and A: "batch", "ema", "learned" or "constant"
      (psi = 1: OPRF).
    per_dimension: whether each coordinate has its own A.

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., FAVOR#, 2023, section 4 (2302.00787); per_dimension is
    an extension.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("saderf", "orf", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jnp.arange(12.0).reshape(1, 3, 1, 4) / 12
    >>> stats = fm.calibrate(v, 2 * x, x)
    >>> stats["component"]["query_map"].round(3)
    Array([[[0.707, 0.707, 0.707, 0.707]]], dtype=float32)
  """

  per_dimension: bool = False

  info = base.ComponentInfo(
    name="saderf",
    family="dense exponential",
    estimates="softmax or Gaussian kernel",
    formula="(1-4A)^(H/4) exp(A|w|^2 + sqrt(1-4A) w.x' - |x'|^2/2), x' = psi x",
    positive=True,
    variance=(
      "prod (1-4a)(1-8a)^(-1/2) exp(2(1-4a)/(1-8a)(x'+y')^2 - x'^2 - y'^2)"
      " / K^2 - 1"
    ),
    cost="F exponentials, H products",
    good_for="queries and keys of different scale, at the price of oprf",
    avoid="causal attention with statistics='batch'",
    source="2302.00787, section 4",
  )

  @property
  @override
  def has_scalar_a(self) -> bool:
    return not self.per_dimension

  @override
  def product(self, x: Array, y: Array) -> Array:
    return x * y

  @override
  def best_maps(self, moments: PyTree) -> Params:
    psi = balance(moments["query_square"], moments["key_square"])
    return {"query_map": psi, "key_map": 1.0 / psi}

  @override
  def init_maps(self, head_dim: int) -> Params:
    return {"log_psi": jnp.zeros((head_dim,), jnp.float32)}

  @override
  def learned_maps(self, params: Params) -> Params:
    log_psi = params["log_psi"]
    return {"query_map": jnp.exp(log_psi), "key_map": jnp.exp(-log_psi)}


def balance(query_square: Array, key_square: Array) -> Array:
  """Returns the scale psi that makes mean squares of queries and keys equal."""
  # A coordinate may be zero at all positions.
  tiny = 1e-6 * jnp.mean(query_square + key_square) + 1e-30
  ratio = (key_square + tiny) / (query_square + tiny)
  return jnp.clip(ratio**0.25, MIN_SCALE, MAX_SCALE)


def _mean_product(left: Array, product: Array, right: Array) -> Array:
  """Returns the diagonal of left product right^T, ``[H]``."""
  if left.ndim == 2:
    return jnp.einsum("gh,hk,gk->g", left, product, right, precision="highest")
  return left * product * right
