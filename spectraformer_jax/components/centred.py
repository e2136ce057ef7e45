"""Centring: any map of the softmax or Gaussian kernel, fed centred vectors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.components.base import (
  COMPONENTS,
  Component,
  ComponentState,
  KernelComponent,
  covariance,
  masked_mean,
)
from spectraformer_jax.components.data_dependent import check_statistics
from spectraformer_jax.typing import Array, LogFeatures, PyTree


@dataclasses.dataclass(frozen=True)
class Centred(Component):
  r"""A component whose queries and keys lose their means first.

  .. math::
    e^{x \cdot y} = e^{(x - c_q) \cdot (y - c_k)}\;
      e^{x \cdot c_k - c_q \cdot c_k}\; e^{c_q \cdot y}

  The softmax kernel of centred vectors differs from that of the vectors by one
  factor per query and one per key, both exact, so any estimator of it may be
  fed :math:`x - c_q` and :math:`y - c_k` with :math:`c_q, c_k` the means of
  queries and keys. The estimate stays unbiased whatever the centres; the
  variance loses what the means add to :math:`|x + y|^2`. The Gaussian kernel
  allows one centre for both sides only, :math:`c = (c_q + c_k) / 2`, which
  takes the same off :math:`|x + y|^2` and needs no factor; a trigonometric map
  of it looks at x - y alone and is left as it is.

  Usually made by the option ``centred=True`` of every softmax map. Centres come
  from where the component's own parameters do (`statistics`).

  Args:
    base: the component that sees centred vectors; of the softmax or Gaussian
      kernel.
    statistics: where the centres come from: "batch", "ema" or "learned". None:
      where those of `base` do; "batch" if it has none.

  Raises:
    ValueError: a base of another kernel; centres of unknown or constant source
      (a constant centre is zero: no centring), or of another source than the
      base's parameters.

  References:
    None: an identity of the exponential, true of each of the papers' maps.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=16,
    ...                     component_kwargs={"centred": True})
    >>> fm.info.name
    'c_posrf-orf'
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jax.random.normal(jax.random.key(1), (1, 9, 1, 4)) + 1.0
    >>> stats = fm.calibrate(v, x, x)
    >>> fm.apply(v, x, side="key", stats=stats).shape
    (1, 9, 1, 16)
  """

  base: KernelComponent
  statistics: str | None = None

  def __post_init__(self):
    if not isinstance(self.base, KernelComponent):
      raise ValueError(
        f"component {self.base.info.name!r} cannot be centred: it estimates "
        "neither the softmax nor the Gaussian kernel."
      )
    own = getattr(self.base, "statistics", None)
    if self.statistics is None:
      object.__setattr__(self, "statistics", own or "batch")
    check_statistics(self.statistics)
    if own not in (None, self.statistics):
      raise ValueError(
        f"statistics={self.statistics!r} of the centres must be that of "
        f"component {self.base.info.name!r}, {own!r}."
      )
    if self.statistics == "constant":
      raise ValueError(
        "centred needs statistics='batch', 'ema' or 'learned', got 'constant': "
        "a constant centre is zero and changes nothing."
      )

  @property
  def info(self):
    """Facts of the base, under the name "c_..."."""
    base = self.base.info
    return dataclasses.replace(
      base,
      name=f"c_{base.name}",
      formula=f"{base.formula} at x - c",
      variance=base.variance and f"{base.variance} at x - c_q and y - c_k",
      cost=f"{base.cost}; H products",
      good_for="queries or keys with a mean",
      avoid="causal attention with statistics='batch'",
    )

  @property
  def kernel(self) -> str:
    """The kernel it estimates."""
    return self.base.kernel

  @property
  def needs_stats(self):
    """See `Component.needs_stats`."""
    return self.statistics != "learned"

  def feature_dim(self, num_features, head_dim):
    """See `Component.feature_dim`."""
    return self.base.feature_dim(num_features, head_dim)

  def num_rows(self, num_features):
    """See `Component.num_rows`."""
    return self.base.num_rows(num_features)

  @property
  def row_draws(self):
    """See `Component.row_draws`."""
    return self.base.row_draws

  def check(self, num_features, head_dim):
    """See `Component.check`."""
    self.base.check(num_features, head_dim)

  def init(self, rng, head_dim):
    """See `Component.init`: centres if learned, beside what the base has."""
    params = {"base": self.base.init(rng, head_dim)}
    if self.statistics == "learned":
      zeros = jnp.zeros((head_dim,), jnp.float32)
      params["centre"] = {"query_mean": zeros, "key_mean": zeros}
    return {name: part for name, part in params.items() if part}

  def draw(self, rng, num_features, head_dim):
    """See `Component.draw`."""
    return self.base.draw(rng, num_features, head_dim)

  def moments(self, query, key, query_mask, key_mask):
    """See `Component.moments`.

    "base" are those of the base, about the example's own centre, where they
    lose no digits to the means; "scatter" is what they lack about another.
    """
    centre = {
      "query_mean": masked_mean(query, query_mask),
      "key_mean": masked_mean(key, key_mask),
    }
    query_centre, key_centre = self._centres(centre)
    base = self.base.moments(
      query - query_centre[None, :],
      key - key_centre[None, :],
      query_mask,
      key_mask,
    )
    return {"centre": centre, "base": base, "scatter": self._scatter(centre)}

  def solve(self, moments):
    """See `Component.solve`; the base's moments are moved to one centre."""
    centre = moments["centre"]
    scatter = jax.tree.map(
      covariance, moments["scatter"], self._scatter(centre)
    )
    base = self.base.add_scatter(moments["base"], scatter)
    return {"centre": centre, "base": self.base.solve(base)}

  def _scatter(self, centre: PyTree) -> PyTree:
    """What an example's means add to its moments about its own centre."""
    means = centre["query_mean"], centre["key_mean"]
    left = (m - c for m, c in zip(means, self._centres(centre), strict=True))
    return jax.tree.map(
      jnp.subtract, self.base.scatter(*means), self.base.scatter(*left)
    )

  def prepare(self, state, head_dim):
    """See `Component.prepare`."""
    source = state.stats or state.params
    base = self.base.prepare(self._base_state(state), head_dim)
    return state._replace(
      stats={"centre": source["centre"], "base": base.stats}
    )

  def realise_rows(self, rows, num_features, state):
    """See `Component.realise_rows`."""
    return self.base.realise_rows(rows, num_features, self._base_state(state))

  def log_features(self, x, rows, side, state):
    """See `Component.log_features`."""
    centred, log_factor = self._centre(x, side, state)
    out = self.base.log_features(centred, rows, side, self._base_state(state))
    return LogFeatures(out.log_magnitude + log_factor[:, None], out.factor)

  def query_features(self, x, rows, state):
    """See `Component.query_features`."""
    centred, _ = self._centre(x, "query", state)
    return self.base.query_features(centred, rows, self._base_state(state))

  def kernel_value(self, x, y, state):
    """See `Component.kernel_value`."""
    return self.base.kernel_value(x, y, self._base_state(state))

  def log_second_moment(self, x, y, state):
    """See `Component.log_second_moment`."""
    x, query_factor = self._centre(x, "query", state)
    y, key_factor = self._centre(y, "key", state)
    base = self.base.log_second_moment(x, y, self._base_state(state))
    return base + 2.0 * (query_factor + key_factor)

  def _centres(self, centre) -> tuple[Array, Array]:
    """c_q and c_k, ``[H]`` each, from the means of queries and keys."""
    query_mean, key_mean = centre["query_mean"], centre["key_mean"]
    if self.kernel == "gaussian":
      query_mean = key_mean = 0.5 * (query_mean + key_mean)
    return query_mean, key_mean

  def _centre(self, x, side, state) -> tuple[Array, Array]:
    """Centred vectors, and the log of the factor that makes up for it."""
    centres = self._centres((state.stats or state.params)["centre"])
    own, other = centres if side == "query" else centres[::-1]
    centred = x - jnp.reshape(own, (1,) * (x.ndim - 1) + (-1,))
    if self.kernel == "gaussian":
      return centred, jnp.zeros(x.shape[:-1], x.dtype)
    # x.c_k - c_q.c_k for queries, c_q.y for keys.
    which = centred if side == "query" else x
    return centred, jnp.einsum("...h,h->...", which, other, precision="highest")

  def _base_state(self, state: ComponentState) -> ComponentState:
    """What the base knows."""
    return state._replace(
      params=state.params.get("base", {}),
      stats=state.stats.get("base", ()) if state.stats else (),
    )


def build_component(
  name: str, kwargs: Mapping[str, Any] | None = None
) -> Component:
  """The component called `name`, centred if ``centred=True`` is an option.

  Args:
    name: a name of `list_components`.
    kwargs: options of the component. "centred" is one of every component of the
      softmax or Gaussian kernel; a centred component without a "statistics" of
      its own takes that, too, for its centres.

  Raises:
    ValueError: unknown name or option (the message has the nearest known one),
      or an option's bad value.

  Example:
    >>> build_component("trigrf", {"centred": True}).info.name
    'c_trigrf'
  """
  kwargs = dict(kwargs or {})
  centred = kwargs.pop("centred", False)
  if not isinstance(centred, bool):
    raise ValueError(f"centred must be True or False, got {centred!r}.")
  own = {}
  if centred and "statistics" not in COMPONENTS.options(name):
    own = {k: kwargs.pop(k) for k in ("statistics",) if k in kwargs}
  component = COMPONENTS.build(name, kwargs, shared_options=("centred",))
  return Centred(component, **own) if centred else component
