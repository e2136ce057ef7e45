"""Centres the inputs of any component of the softmax or Gaussian kernel."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components.base import (
  COMPONENTS,
  Component,
  ComponentInfo,
  KernelComponent,
  covariance,
  info_from_options,
  masked_mean,
)
from spectraformer_jax.components.data_dependent import STATISTICS
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Mask,
  Params,
  Projection,
  PyTree,
  Side,
  WeightSample,
)


@dataclasses.dataclass(frozen=True)
class Centred(Component):
  r"""A component that subtracts means from queries and keys first.

  .. math::
    e^{x \cdot y} = e^{(x - c_q) \cdot (y - c_k)}\;
      e^{x \cdot c_k - c_q \cdot c_k}\; e^{c_q \cdot y}

  The softmax kernel of centred vectors differs from that of the original ones
  by one factor per query and one per key, both known exactly. So any estimator
  of this kernel can be applied to :math:`x - c_q` and :math:`y - c_k`, with
  :math:`c_q, c_k` the means of queries and keys. The estimate stays unbiased
  whatever the centres, and the variance loses the part of :math:`|x + y|^2`
  that is due to the means. The Gaussian kernel allows only one centre for both
  sides, :math:`c = (c_q + c_k) / 2`, which removes the same part and needs no
  factor; its trigonometric map depends on x - y only, so centring has no effect
  there.

  The option ``centred=True`` of every component of these kernels makes such a
  component.

  Args:
    base: the component that maps centred vectors; of the softmax or Gaussian
      kernel.
    statistics: source of the centres: "batch", "ema" or "learned". None: the
      `statistics` of `base`, or "batch" if it has none.

  Raises:
    ValueError: a base of another kernel; an unknown source of the centres, a
      constant one (a constant centre is zero and changes nothing), or another
      one than that of the base's parameters.

  References:
    None: this identity of the exponential holds for the maps of all papers.

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

  def __post_init__(self) -> None:
    if not isinstance(self.base, KernelComponent):
      raise ValueError(
        f"component {self.base.info.name!r} cannot be centred: it estimates "
        "neither the softmax nor the Gaussian kernel."
      )
    of_base = getattr(self.base, "statistics", None)
    statistics = self.statistics
    if statistics is None:
      statistics = of_base or "batch"
      object.__setattr__(self, "statistics", statistics)
    check_choice("statistics", statistics, STATISTICS)
    if of_base not in (None, statistics):
      raise ValueError(
        f"statistics={statistics!r} of the centres must be that of "
        f"component {self.base.info.name!r}, {of_base!r}."
      )
    if statistics == "constant":
      raise ValueError(
        "centred needs statistics='batch', 'ema' or 'learned', got 'constant': "
        "a constant centre is zero and changes nothing."
      )

  def _info(self) -> ComponentInfo:
    """Returns the facts of the base, under the name "c_..."."""
    facts = self.base.info
    return dataclasses.replace(
      facts,
      name=f"c_{facts.name}",
      formula=f"{facts.formula} at x - c",
      variance=facts.variance and f"{facts.variance} at x - c_q and y - c_k",
      cost=f"{facts.cost}; H products",
      good_for="queries or keys with a mean",
      avoid="causal attention with statistics='batch'",
    )

  info = info_from_options(_info)

  @property
  def kernel(self) -> str:
    """Name of the kernel that it estimates."""
    return self.base.kernel

  @property
  @override
  def needs_stats(self) -> bool:
    return self.statistics != "learned"

  @override
  def feature_dim(self, num_features: int, head_dim: int | None) -> int | None:
    return self.base.feature_dim(num_features, head_dim)

  @override
  def num_rows(self, num_features: int) -> int:
    return self.base.num_rows(num_features)

  @property
  @override
  def row_draws(self) -> int:
    return self.base.row_draws

  @override
  def check(self, num_features: int, head_dim: int) -> None:
    self.base.check(num_features, head_dim)

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    """Returns "base", and "centre" if learned; leaves out empty parts."""
    params = {"base": self.base.init(rng, head_dim, num_features)}
    if self.statistics == "learned":
      zeros = jnp.zeros((head_dim,), jnp.float32)
      params["centre"] = {"query_mean": zeros, "key_mean": zeros}
    return {name: part for name, part in params.items() if part}

  @override
  def draw(self, rng: Array, num_features: int, head_dim: int) -> Projection:
    return self.base.draw(rng, num_features, head_dim)

  @override
  def moments(
    self, query: Array, key: Array, query_mask: Mask, key_mask: Mask
  ) -> PyTree:
    """Returns the example's centre, and the base's moments of centred vectors.

    The base's moments are taken about the example's own centre, so that large
    means cost no digits. With "scatter" (a name in stored statistics), `solve`
    moves them to a shared centre.
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
    return {"centre": centre, "base": base, "scatter": self._removed(centre)}

  @override
  def solve(self, moments: PyTree) -> PyTree:
    """Moves the base's moments to one centre, and solves for its parameters."""
    centre = moments["centre"]
    scatter = jax.tree.map(
      covariance, moments["scatter"], self._removed(centre)
    )
    base = self.base.recentre(moments["base"], scatter)
    return {"centre": centre, "base": self.base.solve(base)}

  def _removed(self, centre: PyTree) -> PyTree:
    """Returns what centring an example removes from its moments."""
    means = centre["query_mean"], centre["key_mean"]
    left = (m - c for m, c in zip(means, self._centres(centre), strict=True))
    return jax.tree.map(
      jnp.subtract, self.base.moments_at(*means), self.base.moments_at(*left)
    )

  @override
  def prepare(self, state: ComponentState, head_dim: int) -> ComponentState:
    source = state.stats or state.params
    base = self.base.prepare(self._base_state(state), head_dim)
    return state._replace(
      stats={"centre": source["centre"], "base": base.stats}
    )

  @override
  def realise_rows(
    self, rows: WeightSample, num_features: int, state: ComponentState
  ) -> WeightSample:
    return self.base.realise_rows(rows, num_features, self._base_state(state))

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    centred, log_factor = self._centre(x, side, state)
    out = self.base.log_features(centred, rows, side, self._base_state(state))
    return LogFeatures(out.log_magnitude + log_factor[:, None], out.factor)

  @override
  def query_features(
    self, x: Array, rows: WeightSample, state: ComponentState
  ) -> LogFeatures:
    centred, _ = self._centre(x, "query", state)
    return self.base.query_features(centred, rows, self._base_state(state))

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    return self.base.kernel_value(x, y, self._base_state(state))

  @override
  def log_second_moment(
    self, x: Array, y: Array, state: ComponentState
  ) -> Array:
    x, query_factor = self._centre(x, "query", state)
    y, key_factor = self._centre(y, "key", state)
    base = self.base.log_second_moment(x, y, self._base_state(state))
    return base + 2.0 * (query_factor + key_factor)

  def _centres(self, centre: PyTree) -> tuple[Array, Array]:
    """Returns c_q and c_k, ``[H]``, from the means of queries and keys."""
    query_mean, key_mean = centre["query_mean"], centre["key_mean"]
    if self.kernel == "gaussian":
      query_mean = key_mean = 0.5 * (query_mean + key_mean)
    return query_mean, key_mean

  def _centre(
    self, x: Array, side: Side, state: ComponentState
  ) -> tuple[Array, Array]:
    """Returns x - c and the log of the factor that undoes the centring."""
    centres = self._centres((state.stats or state.params)["centre"])
    own, other = centres if side == "query" else centres[::-1]
    centred = x - jnp.reshape(own, (1,) * (x.ndim - 1) + (-1,))
    if self.kernel == "gaussian":
      return centred, jnp.zeros(x.shape[:-1], x.dtype)
    # x.c_k - c_q.c_k for queries, c_q.y for keys.
    left = centred if side == "query" else x
    return centred, jnp.einsum("...h,h->...", left, other, precision="highest")

  def _base_state(self, state: ComponentState) -> ComponentState:
    """Returns the part of the state that belongs to the base."""
    return state._replace(
      params=state.params.get("base", {}),
      stats=state.stats.get("base", ()) if state.stats else (),
    )


def build_component(
  name: str, kwargs: Mapping[str, Any] | None = None
) -> Component:
  """Builds the component called `name`, centred if ``kwargs["centred"]``.

  Args:
    name: a name of `list_components`.
    kwargs: options of the component. Every component of the softmax or Gaussian
      kernel has the option "centred". Its centred form takes "statistics" as
      the source of the centres, also if the component has no such option.

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
  statistics = None
  if centred and "statistics" not in COMPONENTS.options(name):
    statistics = kwargs.pop("statistics", None)
  component = COMPONENTS.build(name, kwargs, shared_options=("centred",))
  return Centred(component, statistics) if centred else component
