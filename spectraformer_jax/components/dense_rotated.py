"""Dense-exponential features whose pre-map mixes coordinates."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.components.dense import SADERF, DenseExponential, balance
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  Mask,
  Params,
  PyTree,
  WeightSample,
)

# Share of the mean eigenvalue that is added to second moments, which are
# singular for fewer tokens than head_dim. It changes the variance of the
# estimate, never the mean.
RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class DenseRotated(DenseExponential):
  r"""Base of the components with a full matrix G, made in up to two steps.

  "Aligning" makes the second moments of queries and keys equal. "Rotating" then
  turns both to the principal axes Q of x + y, each of which has its own A. Rows
  are turned by Q, too, so that :math:`\omega^\top Q\, a\, Q^\top \omega` and
  :math:`\omega^\top Q (I - 4a)^{1/2} Q^\top x` do not depend on the signs of
  eigenvectors, nor on their choice among equal eigenvalues. Features are then a
  continuous function of the moments: a rounding error in them (from padding or
  another batch) changes features just as little.
  """

  aligns: ClassVar[bool]
  rotates: ClassVar[bool]

  @property
  @override
  def has_scalar_a(self) -> bool:
    return not self.rotates

  @override
  def product(self, x: Array, y: Array) -> Array:
    return jnp.outer(x, y)

  @override
  def mean_square(self, x: Array, mask: Mask) -> Array:
    """Returns the mean of x x^T where `mask`, ``[T, H]`` -> ``[H, H]``."""
    x = x if mask is None else jnp.where(mask[:, None], x, 0.0)
    total = jnp.einsum("th,tg->hg", x, x, precision="highest")
    count = x.shape[0] if mask is None else jnp.maximum(jnp.sum(mask), 1)
    return total / jnp.asarray(count, x.dtype)

  @override
  def best_maps(self, moments: PyTree) -> Params:
    """Adds Q as "axes" if the component rotates."""
    eye = jnp.eye(moments["query_mean"].shape[-1], dtype=jnp.float32)
    maps = {"query_map": eye, "key_map": eye}
    with jax.default_matmul_precision("highest"):
      if self.aligns:
        maps = _align(moments["query_square"], moments["key_square"])
      if self.rotates:
        axes = _principal_axes(moments, **maps)
        maps = {name: axes.T @ linear for name, linear in maps.items()}
        maps["axes"] = axes
      # Refines G^-T by a Newton step: an inexact inverse biases the estimate.
      residual = eye - maps["query_map"].T @ maps["key_map"]
      maps["key_map"] += maps["key_map"] @ residual
    return maps

  @override
  def realise_rows(
    self, rows: WeightSample, num_features: int, state: ComponentState
  ) -> WeightSample:
    """Turns rows by Q."""
    parameters = self.parameters(state, rows.w.shape[-1])
    if "axes" not in parameters:
      return rows
    return rows._replace(w=base.project(rows.w, parameters["axes"].T))

  @override
  def init_maps(self, head_dim: int) -> Params:
    """Parametrises G as a rotation times a triangular matrix."""
    zeros = jnp.zeros((head_dim, head_dim), jnp.float32)
    parts = {"skew": self.rotates, "triangle": self.aligns}
    return {name: zeros for name, present in parts.items() if present}

  @override
  def learned_maps(self, params: Params) -> Params:
    head_dim = params["triangle" if self.aligns else "skew"].shape[-1]
    query_map = key_map = eye = jnp.eye(head_dim, dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
      if self.aligns:
        scale = jnp.exp(jnp.diagonal(params["triangle"]))
        query_map = jnp.tril(params["triangle"], -1) + jnp.diag(scale)
        key_map = _inverse_of_lower(query_map).T
      if self.rotates:
        # Cayley's form reaches all rotations except those by half a turn.
        skew = 0.5 * (params["skew"] - params["skew"].T)
        rotation = jnp.linalg.solve(eye - skew, eye + skew)
        query_map, key_map = rotation @ query_map, rotation @ key_map
    return {"query_map": query_map, "key_map": key_map}


@base.COMPONENTS.register("sderf")
@dataclasses.dataclass(frozen=True)
class SDERF(DenseRotated):
  r"""Symmetric dense-exponential random features.

  .. math::
    f(\omega, x) = \prod_l (1 - 4a_l)^{1/4} \exp\Big(\sum_l a_l \omega_l'^2
      + \sqrt{1 - 4a_l}\, \omega'_l x'_l - x_l'^2/2\Big),
    \qquad x' = Q^\top x,\; \omega' = Q^\top \omega

  for queries and keys alike, with Q the eigenvectors of the mean of
  :math:`(x_i + y_j)(x_i + y_j)^\top` over all pairs and :math:`a_l` the best
  value for eigenvalue l: OPRF with its own A along each principal axis. The
  Gaussian kernel subtracts another :math:`|x|^2/2` in the exponent. The second
  moment is that of :class:`SADERF`.

  Costs :math:`O((T + M) H^2)` to turn x and the rows and, per head, an H x H
  eigendecomposition: of every example with statistics="batch", one per step
  with "ema".

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of Q and a: "batch", "ema", "learned" or "constant"
      (Q = I: OPRF).

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., FAVOR#, 2023, section 4 (2302.00787).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("sderf", "orf", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jax.random.normal(jax.random.key(1), (1, 9, 1, 4))
    >>> stats = fm.calibrate(v, x, x)
    >>> fm.apply(v, x, side="key", stats=stats).shape
    (1, 9, 1, 16)
  """

  aligns = False
  rotates = True

  info = dataclasses.replace(
    SADERF.info,
    name="sderf",
    formula=(
      "det(I-4A)^(1/4) exp(w.Aw + w.(I-4A)^(1/2) x - |x|^2/2), A = Q a Q'"
    ),
    cost="F exponentials, H^2 products; an eigendecomposition per head",
    good_for="queries and keys that share principal axes or a mean",
  )


@base.COMPONENTS.register("aderf")
@dataclasses.dataclass(frozen=True)
class ADERF(DenseRotated):
  r"""Asymmetric dense-exponential random features.

  .. math::
    f(\omega, x) = (1 - 4A)^{H/4}
      \exp(A |\omega|^2 + \sqrt{1 - 4A}\, \omega^\top x' - |x'|^2/2),
    \qquad x' = G x \text{ (queries)},\; G^{-\top} x \text{ (keys)}

  with the G that makes the second moments of mapped queries and keys equal:
  :math:`G^\top G = M_x^{-1} \# M_y`, the geometric mean of matrices, with M_x
  and M_y the second moments of queries and keys. A is that of OPRF for the
  mapped data. The Gaussian kernel subtracts :math:`|x|^2/2`, of the unmapped x,
  in the exponent. The second moment is that of :class:`SADERF`.

  Costs :math:`O(T H^2)` for the pre-map and, per head, an H x H Cholesky
  factor and eigendecomposition: of every example with statistics="batch", one
  per step with "ema".

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of G and A: "batch", "ema", "learned" or "constant"
      (G = I: OPRF).

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., FAVOR#, 2023, section 4 (2302.00787); G in the form
    of a geometric mean.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("aderf", "orf", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jax.random.normal(jax.random.key(1), (1, 9, 1, 4))
    >>> maps = fm.calibrate(v, x, 2 * x)["component"]
    >>> product = maps["query_map"][0, 0].T @ maps["key_map"][0, 0]
    >>> bool(jnp.allclose(product, jnp.eye(4), atol=1e-5))
    True
  """

  aligns = True
  rotates = False

  info = dataclasses.replace(
    SADERF.info,
    name="aderf",
    formula="(1-4A)^(H/4) exp(A|w|^2 + sqrt(1-4A) w.x' - |x'|^2/2), x' = Gx",
    cost="F exponentials, H^2 products; an eigendecomposition per head",
    good_for="queries and keys of different covariances",
  )


@base.COMPONENTS.register("asderf")
@dataclasses.dataclass(frozen=True)
class ASDERF(DenseRotated):
  r"""Asymmetric dense-exponential features with one A per principal axis.

  The map of ADERF followed by SDERF: :math:`x'` is :math:`Q^\top G x` for
  queries and :math:`Q^\top G^{-\top} x` for keys. The variance (mean log second
  moment) is never above that of ADERF, and the lowest of all components with
  one exponential per row on all data tried. At equal feature dimension,
  :class:`OPRFHyperbolic` has less variance on small isotropic data, and far
  more on data of unequal axes. The second moment is that of :class:`SADERF`.

  Costs :math:`O((T + M) H^2)` to map x and the rows and, per head, two H x H
  eigendecompositions: of every example with statistics="batch", one per step
  with "ema".

  Args:
    kernel: "softmax" or "gaussian".
    statistics: source of G, Q and a: "batch", "ema", "learned" or "constant"
      (identities: OPRF).

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    An extension of Likhosherstov et al., FAVOR#, 2023, section 4 (2302.00787).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("asderf", "orf", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jax.random.normal(jax.random.key(1), (1, 9, 1, 4))
    >>> fm.calibrate(v, x, x)["component"]["rho"].shape
    (1, 1, 4)
  """

  aligns = True
  rotates = True

  info = dataclasses.replace(
    SADERF.info,
    name="asderf",
    formula=(
      "det(I-4A)^(1/4) exp(w.Aw + w.(I-4A)^(1/2) x' - |x'|^2/2), "
      "A = Q a Q', x' = Gx"
    ),
    cost="F exponentials, H^2 products; two eigendecompositions per head",
    good_for="the least variance where axes are unequal or queries and keys "
    "differ; on small isotropic data oprf_hyp has less",
    source="extends 2302.00787, section 4",
  )


def _align(query_square: Array, key_square: Array) -> Params:
  """Returns a triangular G with G Mx G^T = G^-T My G^-1, and its G^-T."""
  head_dim = query_square.shape[-1]
  eye = jnp.eye(head_dim, dtype=query_square.dtype)
  # Both moments are divided by their sizes first, so that neither underflows.
  sizes = [jnp.trace(m) / head_dim for m in (query_square, key_square)]
  query_square, key_square = (
    m / jnp.maximum(size, 1e-30) + RIDGE * eye
    for m, size in zip((query_square, key_square), sizes, strict=True)
  )
  factor = jnp.linalg.cholesky(query_square)
  squares, axes = jnp.linalg.eigh(factor.T @ key_square @ factor)
  # The fourth root below would magnify rounding errors of small eigenvalues.
  squares = jnp.maximum(squares, 1e-4 * squares[-1])
  # G^T G is the geometric mean. Its triangular factor G is unique and
  # continuous, unlike the one from eigenvectors.
  half = (axes * squares[None, :] ** 0.25).T @ _inverse_of_lower(factor)
  lower = balance(*sizes) * jnp.linalg.cholesky(half.T @ half)
  return {"query_map": lower.T, "key_map": _inverse_of_lower(lower)}


def _inverse_of_lower(lower: Array) -> Array:
  """Returns the inverse of a lower triangular matrix."""
  eye = jnp.eye(lower.shape[-1], dtype=lower.dtype)
  return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)


def _principal_axes(moments: PyTree, query_map: Array, key_map: Array) -> Array:
  """Returns the eigenvectors, as columns, of the mean of (x'+y')(x'+y')^T."""
  crossed = query_map @ moments["cross"] @ key_map.T
  return jnp.linalg.eigh(
    query_map @ moments["query_square"] @ query_map.T
    + key_map @ moments["key_square"] @ key_map.T
    + crossed
    + crossed.T
  )[1]
