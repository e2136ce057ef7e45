"""Base of both adapters: a record of a feature map and its variables."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from spectraformer_jax import checks
from spectraformer_jax.attention_checks import check_statistics
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import (
  ExactKeys,
  check_heavy,
  exact_keys_of,
  kernel_of,
)
from spectraformer_jax.typing import FeatureVariables, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
  """A record that compares by content, so that equal ones share a program.

  Of arrays, the hash depends on shapes and dtypes alone. Equality compares the
  content of two arrays only if they are not the same object.

  Attributes:
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: of the map.
    stats: its data-dependent parameters; see `spectral_attention`.
    exact: which keys are exact; from `exact_keys_for`.
  """

  feature_map: FeatureMap
  variables: FeatureVariables
  stats: PyTree = None
  exact: ExactKeys = ExactKeys()

  def check_causal(self) -> None:
    """Raises ValueError if attention with this record cannot be causal."""
    check_statistics(self.feature_map, self.stats, True, None, False)
    check_heavy(self.exact, is_causal=True)

  def _leaves(self) -> list[Any]:
    return jax.tree.leaves((self.variables, self.stats))

  def _static(self) -> Hashable:
    """Returns everything but the content of arrays."""
    arrays = {"variables", "stats"}
    fields = {k: v for k, v in vars(self).items() if k not in arrays}
    structure = jax.tree.structure((self.variables, self.stats))
    shapes = [(jnp.shape(x), str(jnp.result_type(x))) for x in self._leaves()]
    return type(self), tuple(fields.values()), structure, tuple(shapes)

  @override
  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Adapter):
      return NotImplemented
    return self is other or (
      self._static() == other._static()
      and all(map(_equal, self._leaves(), other._leaves()))
    )

  @override
  def __hash__(self) -> int:
    return hash(self._static())

  @override
  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.feature_map.info.name!r})"


def exact_keys_for(
  feature_map: FeatureMap, window: Any, num_sinks: int, num_heavy: int
) -> ExactKeys:
  """Returns the exact keys of an adapter.

  Raises:
    ValueError: an option has another form, or the map estimates a kernel of its
      own.
  """
  exact = exact_keys_of(window, num_sinks, num_heavy, is_causal=False)
  if not exact.are_none:
    kernel_of(feature_map.component)
  return exact


def _equal(leaf: Any, other: Any) -> bool:
  """Whether two leaves are the same object, or have the same known content."""
  if leaf is other:
    return True
  x, y = checks.concrete(leaf), checks.concrete(other)
  return x is not None and y is not None and np.array_equal(x, y)
