"""TensorSketch: hashed features of a power of x.y."""

import dataclasses

import jax
import jax.numpy as jnp

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.components.base import (
  COMPONENTS,
  Component,
  ComponentInfo,
  project,
  sized,
)
from spectraformer_jax.typing import LogFeatures
from spectraformer_jax.weight_matrices.stored_uniforms import NUM_BITS

LARGEST_DEGREE = 8


@COMPONENTS.register("tensorsketch")
@dataclasses.dataclass(frozen=True)
class TensorSketch(Component):
  r"""TensorSketch of the polynomial kernel.

  .. math::
    \phi(x) = \mathcal{F}^{-1} \prod_{j=1}^p \mathcal{F}(C_j x), \qquad
    (C_j x)_b = \sum_{l : h_j(l) = b} s_j(l) x_l, \qquad
    E\, \phi(x) \cdot \phi(y) = (x \cdot y)^p

  with p independent hashes h of coordinates to B = num_features buckets, and
  signs s. Unbiased; the variance falls like 1/B. Not of the form f(W x, x): the
  weight matrix only supplies hashes, one row for each, and those that spread
  rows have nothing to spread. For odd p the kernel itself is negative where x.y
  is.

  Features are signed, so the normalizer of attention can come out near zero or
  negative; it is kept away from zero, which biases the output where that
  happens and doubles the cost of the sums.

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

  def __post_init__(self):
    check_positive_int("degree", self.degree)
    if self.degree > LARGEST_DEGREE:
      raise ValueError(
        f"degree must be at most {LARGEST_DEGREE}, got {self.degree}."
      )

  @property
  def info(self):
    """Facts; the kernel depends on the degree."""
    return ComponentInfo(
      name="tensorsketch",
      family="own kernel",
      estimates=f"(x.y)^{self.degree}",
      formula="circular convolution of the count sketches of x",
      positive=False,
      features="M",
      cost=f"{self.degree} projections and {self.degree + 1} FFTs of size M",
      good_for="polynomial kernels of known, low degree",
      avoid="odd degrees in attention: weights are then negative",
      source="Pham and Pagh 2013",
      row_law="hash",
    )

  def num_rows(self, num_features):
    """See `Component.num_rows`: one for each hash."""
    del num_features
    return self.degree

  @property
  def row_draws(self):
    """See `Component.row_draws`: hashes are independent."""
    return self.degree

  def realise_rows(self, rows, num_features, state):
    """See `Component.realise_rows`: hashes to count sketches ``[p B, H]``."""
    del state
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

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    del side, state
    num_features = rows.w.shape[0] // self.degree
    size = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    size = jax.lax.stop_gradient(jnp.where(size > 0.0, size, 1.0))
    spectrum = 1.0
    for sketch in jnp.split(rows.w, self.degree):
      spectrum *= jnp.fft.rfft(project(x / size, sketch))
    out = sized(jnp.fft.irfft(spectrum, num_features))
    # Of the order of one feature of M, as the caller divides by sqrt(M).
    log_size = self.degree * jnp.log(size) + 0.5 * jnp.log(float(num_features))
    return LogFeatures(out.log_magnitude + log_size, out.factor)

  def kernel_value(self, x, y, state):
    """See `Component.kernel_value`."""
    del state
    return jnp.sum(x * y, axis=-1) ** self.degree
