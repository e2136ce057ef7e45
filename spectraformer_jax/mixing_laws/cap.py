"""Kernels of mixing laws whose T is capped, by quadrature."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from spectraformer_jax.mixing_laws.laws import MixingLaw
from spectraformer_jax.typing import Array

# The quadrature of `capped_log_kernel` is accurate up to this cap.
LARGEST_TAU = 100.0


def capped_log_kernel(law: MixingLaw, square: Array, tau: float) -> Array:
  r"""Returns the log of :math:`E \exp(-\min(T, \tau) r^2 / 2)`.

  At most :math:`P(T > \tau) e^{-\tau r^2 / 2}` above K.

  Args:
    law: of T; K itself for one that needs no cap.
    square: r^2, ``[...]``.
    tau: the cap, at most `LARGEST_TAU`.

  Example:
    >>> from spectraformer_jax.mixing_laws import Laplacian
    >>> capped = capped_log_kernel(Laplacian(), jnp.float32(0.04), 4.0)
    >>> round(float(jnp.exp(capped)), 4)
    0.9551
  """
  if not law.needs_cap:
    return law.log_kernel(square)
  scales, log_weights = _capped_mixture(law, tau)
  nodes = (None,) * square.ndim
  exponent = -0.5 * square[..., None] * scales[nodes]
  return logsumexp(exponent + log_weights[nodes], axis=-1)


@functools.lru_cache
def _capped_mixture(law: MixingLaw, tau: float) -> tuple[Any, Any]:
  """Returns nodes of min(T, tau) and log weights: a quadrature, ``[Q]`` each.

  Below tau it is the trapezoidal rule in y, with s = log tau - exp(y). The last
  node is tau itself and has the rest of the probability.
  """
  step = 0.02
  y = np.arange(-18.0, math.log(400.0), step)
  log_scale = math.log(tau) - np.exp(y)
  with jax.ensure_compile_time_eval():
    density = law.log_density(jnp.asarray(log_scale, jnp.float32))
  log_weight = np.asarray(density, np.float64) + y + math.log(step)
  rest = max(1.0 - float(np.sum(np.exp(log_weight))), 1e-30)
  scales = np.append(np.exp(log_scale), tau)
  log_weights = np.append(log_weight, math.log(rest))
  return scales.astype(np.float32), log_weights.astype(np.float32)
