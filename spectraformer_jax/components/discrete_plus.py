"""Positive discrete features: the same, of coordinates shifted above zero."""

import dataclasses

import jax.numpy as jnp

from spectraformer_jax.components.base import COMPONENTS, masked_mean
from spectraformer_jax.components.discrete import Discrete, GeomRF, PoisRF
from spectraformer_jax.typing import Array

# How far below the least coordinate the shift lies: features then are positive
# and gradients at the least coordinate are not larger than 1 / MARGIN.
MARGIN = 1e-3


class Shifted(Discrete):
  """What the plus forms have in common: one shift c for queries and keys.

  exp(x.y) = exp((x - c).(y - c)) exp(x.c - |c|^2/2) exp(y.c - |c|^2/2).
  """

  @property
  def info(self):
    """Facts; positive only where the shift is below all that is mapped."""
    return dataclasses.replace(
      super().info,
      name=f"{super().info.name}_plus",
      formula=f"exp(x.c - |c|^2/2) times, at x - c: {super().info.formula}",
      positive=self.statistics == "batch",
      variance=f"{super().info.variance}, at x - c and y - c",
      good_for="a discrete map whose normalizers are positive",
      avoid=(
        "causal attention with statistics='batch'; training, as gradients are "
        "large at the least coordinates"
      ),
    )

  def init(self, rng, head_dim):
    """See `Component.init`: the shift, beside the law's parameter."""
    params = super().init(rng, head_dim)
    if self.statistics == "learned":
      params["shift"] = self.constant(head_dim)["shift"]
    return params

  def from_params(self, params):
    """See `DataDependent.from_params`."""
    return super().from_params(params) | {"shift": params["shift"]}

  def moments(self, query, key, query_mask, key_mask):
    """See `Component.moments`."""
    return super().moments(query, key, query_mask, key_mask) | {
      "query_mean": masked_mean(query, query_mask),
      "key_mean": masked_mean(key, key_mask),
      "least": _least(query, key, query_mask, key_mask),
    }

  def shifted(self, x, parameters):
    """See `Discrete.shifted`."""
    shift = jnp.reshape(parameters["shift"], (1,) * (x.ndim - 1) + (-1,))
    # x.c - |c|^2/2, without the digits that cancel.
    return x - shift, (x - 0.5 * shift) * shift


def _least(query, key, query_mask, key_mask) -> Array:
  """Least value of each coordinate, ``[H]``; 0 where no position counts."""
  least = jnp.full(query.shape[-1:], jnp.inf)
  for x, mask in ((query, query_mask), (key, key_mask)):
    if mask is not None:
      x = jnp.where(mask[:, None], x, jnp.inf)
    least = jnp.minimum(least, jnp.min(x, axis=0))
  return jnp.where(jnp.isfinite(least), least, 0.0)


@COMPONENTS.register("poisrf_plus")
@dataclasses.dataclass(frozen=True)
class PoisRFPlus(Shifted, PoisRF):
  r"""Positive Poisson random features (PoisRF+).

  .. math::
    f^+(n, x) = e^{x \cdot c - |c|^2/2} f(n, x - c)

  with f of :class:`PoisRF` and c, one vector for all queries and keys of a
  head, just below the least value of each coordinate: every coordinate of x - c
  is then positive, and so are all features. (The Gaussian kernel does not
  change when both sides are shifted.) The second moment of one row is that of
  :class:`PoisRF` at x - c and y - c, usually far larger: the price of the sign
  (which :class:`GeomRFPlus` hardly pays).

  Unbiased for every c. Positivity holds where c is below all that is mapped:
  with "batch", which looks. A running average of minima, a learned or a
  constant c (three standard deviations) is below most coordinates but not all;
  the others enter with their sign, so that the estimate stays unbiased, and
  attention guards its normalizer as for any signed map, with the bias and the
  doubled sums that this costs. The same holds, unguarded, for stats of other
  data passed by hand to "batch".

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where rate and c come from: "batch", "ema", "learned" or
      "constant".

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, positive discretely
    induced features (2205.15317).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("poisrf_plus", "iid", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jax.random.normal(jax.random.key(1), (1, 9, 1, 4))
    >>> stats = fm.calibrate(v, x, x)
    >>> bool((fm.apply(v, x, side="key", stats=stats) >= 0).all())
    True
  """

  def solve(self, moments):
    """See `Component.solve`: the law's parameter is that of shifted data."""
    shift = moments["least"] - MARGIN
    shifted = {
      f"{side}_square": _square_about(
        moments[f"{side}_square"], moments[f"{side}_mean"], shift
      )
      for side in ("query", "key")
    }
    return super().solve(shifted) | {"shift": shift}


@COMPONENTS.register("geomrf_plus")
@dataclasses.dataclass(frozen=True)
class GeomRFPlus(Shifted, GeomRF):
  r"""Positive geometric random features (GeomRF+).

  .. math::
    f^+(n, x) = e^{x \cdot c - |c|^2/2} f(n, x - c)

  with f of :class:`GeomRF` and c as for :class:`PoisRFPlus`: all that is said
  there of positivity holds here, too. The second moment of one row is that of
  :class:`GeomRF` at x - c and y - c.

  Args:
    kernel: "softmax" or "gaussian".
    statistics: where p and c come from: "batch", "ema", "learned" or
      "constant".

  Raises:
    ValueError: unknown kernel or statistics.

  References:
    Likhosherstov et al., Chefs' Random Tables, 2022, positive discretely
    induced features (2205.15317).

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> fm = sf.feature_map("geomrf_plus", "iid", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jax.random.normal(jax.random.key(1), (1, 9, 1, 4))
    >>> stats = fm.calibrate(v, x, x)
    >>> bool((fm.apply(v, x, side="key", stats=stats) >= 0).all())
    True
  """

  def solve(self, moments):
    """See `Component.solve`: the law's parameter is that of shifted data."""
    shift = moments["least"] - MARGIN
    # All coordinates lie above the shift, so their sizes are their distances.
    shifted = {
      f"{side}_size": jnp.abs(moments[f"{side}_mean"] - shift)
      for side in ("query", "key")
    }
    return super().solve(shifted) | {"shift": shift}


def _square_about(square: Array, mean: Array, shift: Array) -> Array:
  """Mean of (x - shift)^2 from those of x^2 and x."""
  variance = jnp.maximum(square - jnp.square(mean), 0.0)
  return variance + jnp.square(mean - shift)
