"""Where the parameters of data-dependent components come from."""

import dataclasses

from spectraformer_jax.components.base import ComponentState, KernelComponent
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import PyTree

STATISTICS = ("batch", "constant", "ema", "learned")


@dataclasses.dataclass(frozen=True)
class DataDependent(KernelComponent):
  """Base of the components whose optimal parameters depend on the data.

  Any value of the parameters keeps the estimate unbiased; good ones lower its
  variance. One set serves all queries and all keys of a head of an example.

  Args:
    kernel: see `KernelComponent`.
    statistics: where the parameters come from. "batch": closed form from the
      queries and keys at hand, each example for itself; looks at the whole
      sequence, so causal attention refuses it. "ema": running statistics, given
      as `stats` (`sf.nn` keeps them). "learned": parameters trained by
      gradient. "constant": the closed form for unit-variance queries and keys.
  """

  statistics: str = "batch"

  def __post_init__(self):
    super().__post_init__()
    check_statistics(self.statistics)

  @property
  def needs_stats(self):
    """See `Component.needs_stats`."""
    return self.statistics in ("batch", "ema")

  def constant(self, head_dim: int) -> PyTree:
    """What `solve` gives for unit-variance, unscaled queries and keys."""
    raise NotImplementedError

  def from_params(self, params) -> PyTree:
    """What `solve` gives, computed from learnable parameters instead."""
    raise NotImplementedError

  def parameters(self, state: ComponentState, head_dim: int) -> PyTree:
    """The parameters in force: from stats if given, else as configured."""
    if not isinstance(state.stats, tuple) or state.stats:
      return state.stats
    if self.statistics == "learned":
      return self.from_params(state.params)
    return self.constant(head_dim)

  def prepare(self, state, head_dim):
    """See `Component.prepare`: the parameters in force become the stats."""
    return state._replace(stats=self.parameters(state, head_dim))


def check_statistics(statistics: str) -> None:
  """ValueError unless `statistics` names a source of parameters."""
  if statistics not in STATISTICS:
    raise ValueError(
      f"Unknown statistics {statistics!r}.{nearest(statistics, STATISTICS)}"
    )
