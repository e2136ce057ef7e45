"""ReBased: the square of a product of learnt, normalised vectors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.components.learnt import Learnt
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Params,
  Side,
  WeightSample,
)

# Added to the variance, as layer norms do.
NORM_EPSILON = 1e-5


@base.COMPONENTS.register("rebased")
@dataclasses.dataclass(frozen=True)
class ReBased(Learnt):
  r"""ReBased: squares of products of vectors, normalised and rescaled.

  .. math::
    u = \gamma \odot \mathrm{norm}(x) + \beta, \qquad
    f(x) = [u_a^2, \sqrt 2\, u_a u_b]_{a < b}, \qquad
    \phi(x) \cdot \psi(y) = (u_q \cdot u_k)^2

  where norm subtracts the mean over coordinates and divides by the standard
  deviation. :math:`\gamma` and :math:`\beta` are learnt, other ones for queries
  than for keys. Public code leaves out the root of 2; the square is exact with
  it. Deterministic, without W: weight matrix "none", num_features=None.

  Features are signed but the kernel is not negative; `ComponentInfo.positive`
  says what attention does with signed features. The output is zeros where the
  vector of a query is orthogonal to those of all keys.

  References:
    Aksenov et al., Linear Transformers with Learnable Kernel Functions are
    Better In-Context Models, 2024, section 4 (2402.10644).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("rebased", "none", num_features=None)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jnp.array([[[1.0, 1.0, -1.0, -1.0]]])
    >>> phi, psi = (fm.apply(v, x, side=s)[0, 0] for s in ("query", "key"))
    >>> phi.shape, round(float(phi @ psi), 2)
    ((10,), 16.0)
  """

  info = base.ComponentInfo(
    name="rebased",
    family="learnt",
    estimates="(u_q . u_k)^2, u = gamma norm(x) + beta, learnt",
    formula="[u_a^2, sqrt(2) u_a u_b], a < b",
    positive=False,
    features="H(H+1)/2",
    cost="H(H+1)/2 products",
    good_for="trained attention at small head_dim",
    avoid="large head_dim; fits that need positive features",
    source="2402.10644, section 4",
    row_law="none",
    learnable=True,
  )

  @override
  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    return None if head_dim is None else head_dim * (head_dim + 1) // 2

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    return {
      f"{side}_{name}": jnp.full((head_dim,), start, jnp.float32)
      for side in ("query", "key")
      for name, start in (("gamma", 1.0), ("beta", 0.0))
    }

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    gamma, beta = (state.params[f"{side}_{name}"] for name in ("gamma", "beta"))
    u = gamma[None] * _normalise(x) + beta[None]
    a, b = np.triu_indices(x.shape[-1])
    weight = np.where(a == b, 1.0, math.sqrt(2.0)).astype(np.float32)
    return base.to_log_features(weight[None] * u[:, a] * u[:, b])


def _normalise(x: Array) -> Array:
  """Returns x ``[T, H]`` with mean 0 and variance 1 over coordinates."""
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + NORM_EPSILON)
