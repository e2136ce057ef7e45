"""Features of isotropic kernels: mixtures of Gaussian kernels."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax import mixing_laws
from spectraformer_jax.components import base
from spectraformer_jax.mixing_laws import LARGEST_TAU, MixingLaw
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Params,
  Projection,
  Side,
  WeightSample,
)
from spectraformer_jax.weight_matrices import pieces, stored_uniforms

LEARNED = ("scalar", "per_dim", "none")


@base.COMPONENTS.register("isotropic_trig")
@dataclasses.dataclass(frozen=True)
class IsotropicTrig(base.Component):
  r"""Trigonometric features of isotropic kernels with heavy tails or without.

  .. math::
    f(\omega, x) = [\cos \sqrt T \omega^\top (x / \ell),
      \sin \sqrt T \omega^\top (x / \ell)], \qquad
    K = E e^{-T r^2 / 2}, \quad r = |x - y| / \ell

  with one draw of T for each row, from the mixing law of the kernel: e^-r for
  "laplacian"; :mod:`spectraformer_jax.mixing_laws` has the formulas of all. The
  uniforms behind T are stratified over the rows and stored as integers, and T
  multiplies Gaussian rows, so that every Gaussian weight matrix fits. One row
  has the second moment (1 + K(2r)) / 2.

  Where T has a power tail it is capped at tau: without the cap the gradient of
  a feature can have infinite variance. The kernel with the cap is at most
  :math:`P(T > \tau) e^{-\tau r^2 / 2}` larger: a cusp at r = 0 is rounded, and
  distances from about :math:`2 / \sqrt\tau` on keep their kernel.

  Features are signed; `ComponentInfo.positive` says what attention does then.
  At equal sharpness a kernel with a heavy tail is smaller at typical distances
  than the Gaussian one, so its estimates are noisier relative to their size.

  Args:
    law: "laplacian", "matern" (option nu), "rational_quadratic" (b),
      "exp_power" (alpha), "gen_cauchy" (alpha, b), "kummer" (a, b), or a
      `MixingLaw`.
    nu: of the law, as are alpha, a and b; None is the default of the law. They
      are not learnt.
    alpha: see nu.
    a: see nu.
    b: see nu.
    length_scale: initial :math:`\ell`.
    learned: which length scales are trained, through their logarithms: "scalar"
      (one), "per_dim" (one per coordinate) or "none".
    tau: the cap of T; None is 64 / sqrt(H), at which the kernel of queries and
      keys of unit variance at length scale 1 is larger by less than e^-64.

  Raises:
    ValueError: unknown law, `learned` or option of the law; a length scale that
      is not positive; a tau outside its range, or for a law without a cap.

  References:
    Rahimi and Recht 2007 (features); Langrene, Warin and Gruet 2024 (laws,
    2411.02770). One stratified T for each row, and the cap, are this library's.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("isotropic_trig", "orf", num_features=16,
    ...                     component_kwargs={"law": "matern", "nu": 2.5})
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 32)
  """

  law: str | MixingLaw = "laplacian"
  nu: float | None = None
  alpha: float | None = None
  a: float | None = None
  b: float | None = None
  length_scale: float = 1.0
  learned: str = "scalar"
  tau: float | None = None

  features_per_row = 2

  def __post_init__(self) -> None:
    check_choice("learned", self.learned, LEARNED)
    if not 0 < self.length_scale < math.inf:
      raise ValueError(
        f"length_scale must be positive and finite, got {self.length_scale!r}."
      )
    law = self.mixing_law
    if self.tau is not None and not law.needs_cap:
      raise ValueError(
        f"law={self.law!r} has no heavy tail to cap, so tau must be None, got "
        f"{self.tau!r}."
      )
    if self.tau is not None and not 0 < self.tau <= LARGEST_TAU:
      raise ValueError(
        f"tau must be positive and at most {LARGEST_TAU:g}, got {self.tau!r}."
      )

  @property
  def mixing_law(self) -> MixingLaw:
    """The law of T, which `exact_attention` takes as `kernel`."""
    options = {name: getattr(self, name) for name in ("nu", "alpha", "a", "b")}
    given = {name: x for name, x in options.items() if x is not None}
    return mixing_laws.build_law(self.law, given)

  def _info(self) -> base.ComponentInfo:
    """Returns the facts; the kernel depends on the law."""
    return base.ComponentInfo(
      name="isotropic_trig",
      family="trigonometric",
      estimates=f"{self.mixing_law.kernel}, r = |x - y| / length scale",
      formula="[cos sqrt(T) w.x, sin sqrt(T) w.x]",
      positive=False,
      features="2M",
      variance="(1 + K(2r)) / 2K^2 - 1",
      cost="M cosines and M sines",
      good_for="one map for Laplacian, Matern, rational quadratic and other "
      "kernels, with a length scale that is learnt",
      avoid="heavy tails in attention: with spread-out queries and keys "
      "normalizers can be negative",
      source="Rahimi and Recht 2007; 2411.02770",
      even=True,
    )

  info = base.info_from_options(_info)

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    if self.learned == "none":
      return {}
    shape = (head_dim,) if self.learned == "per_dim" else ()
    start = math.log(self.length_scale)
    return {"log_length_scale": jnp.full(shape, start, jnp.float32)}

  @override
  def draw(self, rng: Array, num_features: int, head_dim: int) -> Projection:
    rngs = jax.random.split(rng, self.mixing_law.num_uniforms)
    uniforms = [pieces.stratified_uniforms(rng, num_features) for rng in rngs]
    return {"scale_bits": stored_uniforms.from_uniform(jnp.stack(uniforms, -1))}

  @override
  def realise_rows(
    self, rows: WeightSample, num_features: int, state: ComponentState
  ) -> WeightSample:
    """Multiplies each row by the square root of its T."""
    uniform = stored_uniforms.to_uniform(state.random["scale_bits"])
    law = self.mixing_law
    log_scale = law.log_scale(jnp.moveaxis(uniform, -1, 0))
    if law.needs_cap:
      cap = math.log(self._cap(rows.w.shape[-1]))
      log_scale = jnp.minimum(log_scale, cap)
    return rows._replace(w=rows.w * jnp.exp(0.5 * log_scale)[:, None])

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    angles = base.project(self._over_length_scale(x, state), rows.w)
    factor = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return LogFeatures(jnp.zeros((x.shape[0], 1), x.dtype), factor)

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    return jnp.exp(self._log_kernel(x - y, state))

  @override
  def log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    return jnp.log(0.5 + 0.5 * jnp.exp(self._log_kernel(2.0 * (x - y), state)))

  def _log_kernel(self, difference: Array, state: ComponentState) -> Array:
    """Returns the log of the kernel with the cap, ``[..., H] -> [...]``."""
    scaled = self._over_length_scale(difference, state)
    square = jnp.sum(jnp.square(scaled), axis=-1)
    tau = self._cap(difference.shape[-1])
    return mixing_laws.capped_log_kernel(self.mixing_law, square, tau)

  def _cap(self, head_dim: int) -> float:
    """Returns tau."""
    return 64.0 / math.sqrt(head_dim) if self.tau is None else self.tau

  def _over_length_scale(self, x: Array, state: ComponentState) -> Array:
    """Divides ``[..., H]`` by the length scale."""
    if self.learned == "none":
      return x / self.length_scale
    inverse = jnp.exp(-state.params["log_length_scale"])
    inverse = jnp.broadcast_to(inverse, x.shape[-1:])
    return x * jnp.reshape(inverse, (1,) * (x.ndim - 1) + (-1,))
