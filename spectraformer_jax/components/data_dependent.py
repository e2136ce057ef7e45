"""Sources of the parameters of data-dependent components."""

import dataclasses

from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array, ComponentState, Params

STATISTICS = ("batch", "constant", "ema", "learned")


@dataclasses.dataclass(frozen=True)
class DataDependent(base.KernelComponent):
  """Base of the components whose optimal parameters depend on the data.

  The estimate is unbiased whatever the parameters; good ones lower its
  variance. All queries and keys of one head of one example share the same
  parameters, a flat dictionary of arrays.

  Args:
    kernel: see `KernelComponent`.
    statistics: source of the parameters. "batch": the closed form for the
      queries and keys of each example; it depends on the whole sequence, so
      causal attention refuses it. "ema": running statistics, passed as `stats`
      (`sf.nn` keeps them). "learned": parameters trained by gradient.
      "constant": the closed form for queries and keys that have unit variance
      before they are scaled.
  """

  statistics: str = "batch"

  def __post_init__(self) -> None:
    super().__post_init__()
    check_choice("statistics", self.statistics, STATISTICS)

  @property
  @override
  def needs_stats(self) -> bool:
    return self.statistics in ("batch", "ema")

  def constant(self, head_dim: int) -> Params:
    """Returns the parameters for unscaled data of unit variance."""
    raise NotImplementedError

  def init_params(self, head_dim: int) -> Params:
    """Returns learnable leaves at their start, for statistics="learned"."""
    raise NotImplementedError

  def from_params(self, params: Params) -> Params:
    """Returns the parameters that follow from learnable leaves."""
    raise NotImplementedError

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    return self.init_params(head_dim) if self.statistics == "learned" else {}

  def parameters(self, state: ComponentState, head_dim: int) -> Params:
    """Returns the stats if there are any, else what the options determine."""
    if state.stats:
      return state.stats
    if self.statistics == "learned":
      return self.from_params(state.params)
    return self.constant(head_dim)

  @override
  def prepare(self, state: ComponentState, head_dim: int) -> ComponentState:
    """Puts the parameters in the place of the stats."""
    return state._replace(stats=self.parameters(state, head_dim))
