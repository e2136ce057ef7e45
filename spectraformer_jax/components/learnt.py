"""Components that learn their kernel: what they have in common."""

import dataclasses

from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.typing import Array, ComponentState
from spectraformer_jax.weight_matrices import ORF

# Size of the first rows, relative to Gaussian ones.
START_SCALE = 0.5


@dataclasses.dataclass(frozen=True)
class Learnt(base.Component):
  """Base of the components with parameters of their own and no fixed kernel.

  The rows are parameters of the component, so such a component has no W.
  """

  @override
  def kernel_value(self, x: Array, y: Array, state: ComponentState) -> Array:
    raise ValueError(
      f"component {self.info.name!r} is learnt, so it has no fixed kernel to "
      "compare with."
    )


def start_rows(rng: Array, num_features: int, head_dim: int) -> Array:
  """Draws rows ``[M, H]`` at which to start: orthogonal, of half the size."""
  return START_SCALE * ORF().draw_rows(rng, num_features, head_dim)
