"""Dense-exponential features whose pre-map mixes coordinates."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from spectraformer_jax.components.base import COMPONENTS, masked_mean, project
from spectraformer_jax.components.dense import SADERF, DenseExponential, balance
from spectraformer_jax.typing import Array

# Share of the mean eigenvalue added to second moments, which are singular for
# fewer tokens than head_dim. It touches the variance, never the mean.
RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class DenseRotated(DenseExponential):
  r"""Base of the components with a full matrix G: up to two steps.

  "Aligning" makes the second moments of queries and keys equal; "rotating" then
  turns to the principal axes Q of x + y, one A for each. Rows are turned by Q,
  too: :math:`\omega^\top Q\, a\, Q^\top \omega` and
  :math:`\omega^\top Q (I - 4a)^{1/2} Q^\top x` do not depend on the signs of
  eigenvectors, nor on their choice among equal eigenvalues. Features are a
  continuous function of the moments, so that rounding (padding, another batch)
  cannot turn into another draw.
  """

  aligns: ClassVar[bool]
  rotates: ClassVar[bool]

  @property
  def one_a(self):
    """See `DenseExponential.one_a`."""
    return not self.rotates

  def moments(self, query, key, query_mask, key_mask):
    """See `Component.moments`; "square" is the mean of x x^T."""
    query_mean = masked_mean(query, query_mask)
    key_mean = masked_mean(key, key_mask)
    return {
      "query_square": _mean_outer(query, query_mask),
      "key_square": _mean_outer(key, key_mask),
      "query_mean": query_mean,
      "key_mean": key_mean,
      "cross": jnp.outer(query_mean, key_mean),
    }

  def best_maps(self, moments):
    """See `DenseExponential.best_maps`; with "axes", Q, if it rotates."""
    eye = jnp.eye(moments["query_mean"].shape[-1], dtype=jnp.float32)
    maps = {"query_map": eye, "key_map": eye}
    with jax.default_matmul_precision("highest"):
      if self.aligns:
        maps = _align(moments["query_square"], moments["key_square"])
      if self.rotates:
        axes = _principal_axes(moments, **maps)
        maps = {name: axes.T @ linear for name, linear in maps.items()}
        maps["axes"] = axes
      # One Newton step: an inexact inverse would be a bias.
      residual = eye - maps["query_map"].T @ maps["key_map"]
      maps["key_map"] += maps["key_map"] @ residual
    return maps

  def realise_rows(self, rows, num_features, state):
    """See `Component.realise_rows`: turned by Q."""
    del num_features
    parameters = self.parameters(state, rows.w.shape[-1])
    if "axes" not in parameters:
      return rows
    return rows._replace(w=project(rows.w, parameters["axes"].T))

  def init_maps(self, head_dim):
    """See `DenseExponential.init_maps`: G = rotation times triangle."""
    zeros = jnp.zeros((head_dim, head_dim), jnp.float32)
    parts = {"skew": self.rotates, "triangle": self.aligns}
    return {name: zeros for name, present in parts.items() if present}

  def learned_maps(self, params):
    """See `DenseExponential.learned_maps`."""
    head_dim = next(iter(params.values())).shape[-1]
    query_map = key_map = eye = jnp.eye(head_dim, dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
      if self.aligns:
        scale = jnp.exp(jnp.diagonal(params["triangle"]))
        query_map = jnp.tril(params["triangle"], -1) + jnp.diag(scale)
        key_map = _inverse_of_lower(query_map).T
      if self.rotates:
        # Cayley's form: every rotation but those by half a turn.
        skew = 0.5 * (params["skew"] - params["skew"].T)
        rotation = jnp.linalg.solve(eye - skew, eye + skew)
        query_map, key_map = rotation @ query_map, rotation @ key_map
    return {"query_map": query_map, "key_map": key_map}


@COMPONENTS.register("sderf")
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
  Gaussian kernel takes another :math:`|x|^2/2` off the exponent. Second moment
  as of :class:`SADERF`.

  Costs :math:`O((T + M) H^2)` to turn x and the rows and, per head, an H x H
  eigendecomposition: of every example with statistics="batch", one per step
  with "ema".

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where Q and a come from: "batch", "ema", "learned",
      "constant" (Q = I: OPRF).

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


@COMPONENTS.register("aderf")
@dataclasses.dataclass(frozen=True)
class ADERF(DenseRotated):
  r"""Asymmetric dense-exponential random features.

  .. math::
    f(\omega, x) = (1 - 4A)^{H/4}
      \exp(A |\omega|^2 + \sqrt{1 - 4A}\, \omega^\top x' - |x'|^2/2),
    \qquad x' = G x \text{ (queries)},\; G^{-\top} x \text{ (keys)}

  with the G that makes the second moments of mapped queries and keys equal:
  :math:`G^\top G = M_x^{-1} \# M_y`, the geometric mean of matrices. A is that
  of OPRF for the mapped data. The Gaussian kernel takes :math:`|x|^2/2`, of the
  unmapped x, off the exponent. Second moment as of :class:`SADERF`.

  Costs :math:`O(T H^2)` for the pre-map and, per head, an H x H Cholesky
  factor and eigendecomposition: of every example with statistics="batch", one
  per step with "ema".

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where G and A come from: "batch", "ema", "learned",
      "constant" (G = I: OPRF).

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


@COMPONENTS.register("asderf")
@dataclasses.dataclass(frozen=True)
class ASDERF(DenseRotated):
  r"""Asymmetric dense-exponential features with one A per principal axis.

  ADERF's map first, then SDERF after it: its :math:`x'` is
  :math:`Q^\top G x` for queries and :math:`Q^\top G^{-\top} x` for keys. Never
  more variance (mean log second moment) than ADERF, and the least of all
  components with one exponential a row on all data tried. On small isotropic
  data :class:`OPRFHyperbolic` has less at equal feature dimension, on data of
  unequal axes far more. Second moment as of :class:`SADERF`.

  Costs :math:`O((T + M) H^2)` to map x and the rows and, per head, two H x H
  eigendecompositions: of every example with statistics="batch", one per step
  with "ema".

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where G, Q and a come from: "batch", "ema", "learned",
      "constant" (identities: OPRF).

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


def _mean_outer(x: Array, mask: Array | None) -> Array:
  """Mean of x x^T where `mask`, ``[T, H]`` -> ``[H, H]``."""
  counted = x if mask is None else jnp.where(mask[:, None], x, 0.0)
  total = jnp.einsum("th,tg->hg", counted, counted, precision="highest")
  if mask is None:
    return total / x.shape[0]
  return total / jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)


def _align(query_square: Array, key_square: Array) -> dict[str, Array]:
  """G and G^-T with G Mx G^T = G^-T My G^-1, triangular."""
  head_dim = query_square.shape[-1]
  eye = jnp.eye(head_dim, dtype=query_square.dtype)
  # Sizes are dealt with apart, so that neither moment can underflow.
  sizes = [jnp.trace(m) / head_dim for m in (query_square, key_square)]
  query_square, key_square = (
    m / jnp.maximum(size, 1e-30) + RIDGE * eye
    for m, size in zip((query_square, key_square), sizes, strict=True)
  )
  root = jnp.linalg.cholesky(query_square)
  squares, axes = jnp.linalg.eigh(root.T @ key_square @ root)
  # The fourth root would make much of the rounding of small eigenvalues.
  squares = jnp.maximum(squares, 1e-4 * squares[-1])
  # G^T G is the geometric mean; of all its roots G the triangular one is
  # unique and continuous, unlike the one that eigenvectors make.
  half = (axes * squares[None, :] ** 0.25).T @ _inverse_of_lower(root)
  lower = balance(*sizes) * jnp.linalg.cholesky(half.T @ half)
  return {"query_map": lower.T, "key_map": _inverse_of_lower(lower)}


def _inverse_of_lower(lower: Array) -> Array:
  """The inverse of a lower triangular matrix."""
  eye = jnp.eye(lower.shape[-1], dtype=lower.dtype)
  return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)


def _principal_axes(moments, query_map: Array, key_map: Array) -> Array:
  """Eigenvectors, as columns, of the mean of (x' + y')(x' + y')^T."""
  crossed = query_map @ moments["cross"] @ key_map.T
  return jnp.linalg.eigh(
    query_map @ moments["query_square"] @ query_map.T
    + key_map @ moments["key_square"] @ key_map.T
    + crossed
    + crossed.T
  )[1]
