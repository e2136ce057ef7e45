"""TensorSketch: hashed features of a power of x.y."""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.registry import check_int
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Side,
  WeightSample,
)
from spectraformer_jax.weight_matrices.stored_uniforms import NUM_BITS

LARGEST_DEGREE = 8


@base.COMPONENTS.register("tensorsketch")
@dataclasses.dataclass(frozen=True)
class TensorSketch(base.Component):
  r"""TensorSketch of the polynomial kernel.

  .. math::
    \phi(x) = \mathcal{F}^{-1} \prod_{j=1}^p \mathcal{F}(C_j x), \qquad
    (C_j x)_b = \sum_{l : h_j(l) = b} s_j(l) x_l, \qquad
    E\, \phi(x) \cdot \phi(y) = (x \cdot y)^p

  with p independent hashes h of coordinates to M = num_features buckets, and
  signs s. Unbiased; the variance falls like 1/M. The map is not of the form
  f(W x, x): the weight matrix only supplies one row of hashes for each h, so a
  matrix that spreads its rows has no effect. For odd p the kernel itself is
  negative where x.y is.

  Features are signed; `ComponentInfo.positive` says what attention does then.

  Args:
    degree: p, at most 8.

  Raises:
    ValueError: a degree outside 1..8.

  References:
    Pham and Pagh, Fast and Scalable Polynomial Kernels via Explicit Feature
    Maps, 2013.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("tensorsketch", "iid", num_features=64)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 64)
  """

  degree: int = 2

  def __post_init__(self) -> None:
    check_int("degree", self.degree, 1, LARGEST_DEGREE)

  def _info(self) -> base.ComponentInfo:
    """Returns the facts; the kernel depends on the degree."""
    return base.ComponentInfo(
      name="tensorsketch",
      family="own kernel",
      estimates=f"(x.y)^{self.degree}",
      formula="circular convolution of the count sketches of x",
      positive=False,
      cost=f"{self.degree} projections and {self.degree + 1} FFTs of size M",
      good_for="polynomial kernels of known, low degree",
      avoid="odd degrees in attention: weights are then negative",
      source="Pham and Pagh 2013",
      row_law="hash",
    )

  info = base.info_from_options(_info)

  @override
  def num_rows(self, num_features: int) -> int:
    """One row per hash."""
    return self.degree

  @property
  @override
  def row_draws(self) -> int:
    """One draw per hash, since hashes are independent."""
    return self.degree

  @override
  def realise_rows(
    self, rows: WeightSample, num_features: int, state: ComponentState
  ) -> WeightSample:
    """Turns hashes into count sketches ``[p M, H]``."""
    # The lowest bit is the sign s, the other bits are the hash h.
    bits = rows.w.astype(jnp.int32)
    sign = (1 - 2 * (bits & 1)).astype(jnp.float32)
    half = (bits >> 1).astype(jnp.float32) + 0.5
    uniform = half * jnp.float32(2.0 ** (1 - NUM_BITS))
    bucket = jnp.floor(uniform * num_features).astype(jnp.int32)
    sketch = (
      jax.nn.one_hot(bucket, num_features, dtype=jnp.float32, axis=1)
      * sign[:, None, :]
    )
    return rows._replace(w=jnp.reshape(sketch, (-1, sketch.shape[-1])))

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    num_features = rows.w.shape[0] // self.degree
    size = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    size = jax.lax.stop_gradient(jnp.where(size > 0.0, size, 1.0))
    spectrum = 1.0
    for sketch in jnp.split(rows.w, self.degree):
      spectrum *= jnp.fft.rfft(base.project(x / size, sketch))
    out = base.to_log_features(jnp.fft.irfft(spectrum, num_features))
    # The caller divides by sqrt(M), which these features do not need.
    log_size = self.degree * jnp.log(size) + 0.5 * jnp.log(float(num_features))
    return LogFeatures(out.log_magnitude + log_size, out.factor)

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    return jnp.sum(x * y, axis=-1) ** self.degree
