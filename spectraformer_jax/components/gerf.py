"""Generalised exponential features: the family of TrigRF, PosRF and OPRF."""

import cmath
import dataclasses
import math
import numbers
from typing import NamedTuple

import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.components.optimal import constant_rho, logit
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Params,
  Side,
  WeightSample,
)

Scalar = float | Array


class Coefficients(NamedTuple):
  """Real and imaginary parts of A, B and log D of the query side."""

  a: tuple[Scalar, Scalar]
  b: tuple[Scalar, Scalar]
  log_d: tuple[Scalar, Scalar]


# None: A is fixed. Else: rho as a function of the learnt parameter, where
# A = (1 - 1/rho)/8.
LEARN = (None, "exp", "sigmoid")


@base.COMPONENTS.register("gerf")
@dataclasses.dataclass(frozen=True)
class GERF(base.KernelComponent):
  r"""Generalised exponential random features (GERF).

  .. math::
    f_q(\omega, x) &= D \exp(A |\omega|^2 + B\, \omega^\top x + C |x|^2) \\
    f_k(\omega, y) &= D \exp(A |\omega|^2 + s B\, \omega^\top y + C |y|^2)

  with :math:`D = (1 - 4A)^{H/4}`, :math:`B = \sqrt{s (1 - 4A)}` and
  :math:`C = -s/2` (softmax) or :math:`-(s + 1)/2` (gaussian), for s = +1 or -1
  and real or complex A. s = 1, A = 0 is PosRF; s = 1, A < 0 is OPRF with a
  given A; s = -1, A = 0 is TrigRF.

  With real A and s = 1 features are real and positive, M of them. Otherwise the
  estimate is the real part of :math:`f_q f_k`: features are
  :math:`[\Re f_q, \Im f_q]` and :math:`[\Re f_k, -\Im f_k]`, signed, 2M of
  them, and attention keeps its normalizer away from zero, which biases the
  output there. With :math:`z = x + s y` the second moment of one row is

  .. math::
    \tfrac12 e^{-s(|x|^2 + |y|^2)} \Big\{ \Re\big[ (1-4A)^H (1-8A)^{-H/2}
      e^{2s(1-4A)/(1-8A)\,|z|^2} \big]
      + |1-4A|^H (1 - 8\Re A)^{-H/2}
      e^{2 (\Re B)^2 / (1 - 8 \Re A)\, |z|^2} \Big\}

  Complex A is for study only: no A off the real line has been found to lower
  the variance, and with s = -1 the best A is 0.

  Args:
    kernel: "softmax" or "gaussian".
    a: A, a Python number with real part below 1/8; close to 1/8 the variance
      diverges. None: with sign=1 the closed form of OPRF for unit-variance
      queries and keys, with sign=-1 zero. The initial value if A is learnt.
    sign: s, +1 or -1.
    learn: None keeps A fixed. "sigmoid" trains one real A per head in
      (-inf, 0), where features are bounded; "exp" trains one in (-inf, 1/8).

  Raises:
    ValueError: unknown kernel or `learn`, a `sign` other than +1 and -1, a real
      part of `a` at or above 1/8, a complex `a` to be learnt, or a start at or
      above 0 with learn="sigmoid".
    TypeError: `a` is not a Python number.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, Theorems 3.1 and 3.2
    (2205.15317).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("gerf", "orf", num_features=16,
    ...                     component_kwargs={"a": -0.1 + 0.05j})
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 32)
    >>> fm = sf.feature_map("gerf", "orf", num_features=16,
    ...                     component_kwargs={"learn": "sigmoid"})
    >>> fm.init(jax.random.key(0), head_dim=4).params["component"].keys()
    dict_keys(['rho_logit'])
  """

  a: float | complex | None = None
  sign: int = 1
  learn: str | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.sign not in (1, -1):
      raise ValueError(f"sign must be 1 or -1, got {self.sign!r}.")
    check_choice("learn", self.learn, LEARN)
    a = self.a
    if a is not None and (
      isinstance(a, bool) or not isinstance(a, numbers.Number)
    ):
      raise TypeError(f"a must be a Python number or None, got {a!r}.")
    if a is not None and not (complex(a).real < 0.125 and cmath.isfinite(a)):
      raise ValueError(
        f"a must have a real part below 1/8, got {a!r}: from there on the "
        "features have no finite variance."
      )
    if self.learn is not None and a is not None and complex(a).imag:
      raise ValueError(f"a must be real to be learnt, got {a!r}.")
    # head_dim changes the size of the default A, not its sign.
    start = self._start(1).real
    if self.learn == "sigmoid" and not start < 0.0:
      raise ValueError(
        f"learn='sigmoid' keeps A below 0, so it cannot start at a={start!r}: "
        "use a negative a, or learn='exp'."
      )

  def _info(self) -> base.ComponentInfo:
    """Returns the facts, which differ between real and complex features."""
    real = not self._is_complex
    return base.ComponentInfo(
      name="gerf",
      family="exponential",
      estimates="softmax or Gaussian kernel",
      formula="D exp(A|w|^2 + B w.x + C|x|^2), D, B, C of A and s",
      positive=real,
      features="M" if real else "2M",
      variance=(
        "(1-4A)^H (1-8A)^(-H/2) exp(2(1-4A)/(1-8A)|x+y|^2 - |x|^2 - |y|^2)"
        " / K^2 - 1"
        if real
        else "closed form, see the docstring"
      ),
      cost="F exponentials" if real else "M exponentials, cosines and sines",
      good_for="an A that is fixed or learnt by gradient; causal as it is",
      avoid="complex A or s = -1 in attention: normalizers can vanish",
      source="2205.15317, Theorems 3.1 and 3.2",
      even=self.sign == -1,
    )

  info = base.info_from_options(_info)

  @property
  def _is_complex(self) -> bool:
    """Whether the estimate is the real part of a complex product."""
    return self.sign == -1 or bool(complex(self.a or 0.0).imag)

  def _start(self, head_dim: int) -> complex:
    """Returns the fixed or initial A."""
    if self.a is not None:
      return complex(self.a)
    if self.sign == -1:
      return 0j
    return complex((1.0 - 1.0 / constant_rho(head_dim)) / 8.0)

  @override
  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    return 2 * num_features if self._is_complex else num_features

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    if self.learn is None:
      return {}
    rho = jnp.float32(1.0 / (1.0 - 8.0 * self._start(head_dim).real))
    if self.learn == "sigmoid":
      return {"rho_logit": logit(rho)}
    return {"log_rho": jnp.log(rho)}

  def coefficients(self, state: ComponentState, head_dim: int) -> Coefficients:
    """Returns A, B and log D: floats if A is fixed, scalar arrays if learnt."""
    if self.learn is None:
      a = self._start(head_dim)
      b = cmath.sqrt(1.0 - 4.0 * a) * (1.0 if self.sign == 1 else 1j)
      log_d = 0.25 * head_dim * cmath.log(1.0 - 4.0 * a)
      return Coefficients(*((c.real, c.imag) for c in (a, b, log_d)))
    if self.learn == "sigmoid":
      inverse = 1.0 + jnp.exp(-state.params["rho_logit"])
    else:
      inverse = jnp.exp(-state.params["log_rho"])
    one_minus_4a = (1.0 + inverse) / 2.0
    b = jnp.sqrt(one_minus_4a)
    return Coefficients(
      ((1.0 - inverse) / 8.0, 0.0),
      (b, 0.0) if self.sign == 1 else (0.0, b),
      (0.25 * head_dim * jnp.log(one_minus_4a), 0.0),
    )

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    a, b, log_d = self.coefficients(state, x.shape[-1])
    flip = 1.0 if side == "query" else float(self.sign)
    projected = base.project(x, rows.w)
    norms = jnp.sum(jnp.square(rows.w), axis=-1)[None, :]
    # Real and imaginary parts of log D + A |w|^2 + B w.x.
    real, imaginary = (
      log_d[part] + a[part] * norms + flip * b[part] * projected
      for part in (0, 1)
    )
    log_magnitude = real - self.sign * base.half_square(x)
    log_magnitude += self.gaussian_shift(x)
    if not self._is_complex:
      return LogFeatures(log_magnitude)
    # The estimate is Re(f_q f_k), so the key side takes conjugate parts.
    sines = jnp.sin(imaginary) if side == "query" else -jnp.sin(imaginary)
    factor = jnp.concatenate([jnp.cos(imaginary), sines], axis=-1)
    return LogFeatures(jnp.tile(log_magnitude, (1, 2)), factor)

  @override
  def softmax_log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    head_dim = x.shape[-1]
    (a, a_imag), b, _ = self.coefficients(state, head_dim)
    square = jnp.sum(jnp.square(x + self.sign * y), axis=-1)
    # Logs and angles of 1 - 4A, of 1 - 8A, and their ratio.
    size_4, angle_4 = _polar(1.0 - 4.0 * a, -4.0 * a_imag)
    size_8, angle_8 = _polar(1.0 - 8.0 * a, -8.0 * a_imag)
    ratio = 2.0 * self.sign * jnp.exp(size_4 - size_8)
    turn = angle_4 - angle_8
    # Logs of the complex E f^2 and of E |f|^2, which is the larger one.
    of_square = (
      head_dim * (size_4 - 0.5 * size_8) + ratio * jnp.cos(turn) * square
    )
    angle = (
      head_dim * (angle_4 - 0.5 * angle_8) + ratio * jnp.sin(turn) * square
    )
    of_modulus = (
      head_dim * (size_4 - 0.5 * jnp.log(1.0 - 8.0 * a))
      + 2.0 * b[0] ** 2 / (1.0 - 8.0 * a) * square
    )
    both = jnp.log1p(jnp.exp(of_square - of_modulus) * jnp.cos(angle))
    squares = 2.0 * (base.half_square(x) + base.half_square(y))[..., 0]
    return of_modulus + both - math.log(2.0) - self.sign * squares


def _polar(real: Scalar, imaginary: Scalar) -> tuple[Array, Array]:
  """Returns log modulus and angle of a complex number."""
  log_modulus = 0.5 * jnp.log(real**2 + imaginary**2)
  return log_modulus, jnp.arctan2(imaginary, real)
