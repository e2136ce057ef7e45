"""Component-matrix pairs as text, such as "oprf(centred=True)-rom_hybrid"."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import spectraformer_jax as sf
from spectraformer_jax.commands import parse_literal
from spectraformer_jax.components import build_component
from spectraformer_jax.feature_maps.compose import (
  mismatch,
  takes_num_features,
)
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.weight_matrices import WEIGHT_MATRICES

_PART = r"(\w+)(?:\(([^()]*)\))?"


@dataclasses.dataclass(frozen=True)
class Pair:
  """A component and a weight matrix with options, as text.

  Attributes:
    component: "oprf", or "oprf(centred=True)".
    matrix: "orf", or "rom_hybrid(norms=chi)".
  """

  component: str
  matrix: str

  @property
  def name(self) -> str:
    """The pair as text."""
    return f"{self.component}-{self.matrix}"

  def build(self, num_features: int | None) -> FeatureMap:
    """Builds the feature map; ValueError if a name or option is unknown."""
    component, component_kwargs = split_options(self.component)
    matrix, matrix_kwargs = split_options(self.matrix)
    return sf.feature_map(
      component,
      matrix,
      num_features=num_features,
      component_kwargs=component_kwargs,
      weight_matrix_kwargs=matrix_kwargs,
    )

  @property
  def takes_num_features(self) -> bool:
    """Whether the map takes a number of features."""
    return takes_num_features(*split_options(self.component))


def split_options(text: str) -> tuple[str, dict[str, Any]]:
  """Splits a name from its options.

  Raises:
    ValueError: options are not of the form (name=value, ...).

  Example:
    >>> split_options("rom_hybrid(norms=chi, num_factors=2)")
    ('rom_hybrid', {'norms': 'chi', 'num_factors': 2})
  """
  match = re.fullmatch(_PART, text)
  if not match:
    raise ValueError(f"{text!r} is not a name, or a name(option=value, ...).")
  name, inside = match.groups()
  options = {}
  for item in filter(None, (inside or "").split(",")):
    option, equals, value = (part.strip() for part in item.partition("="))
    if not (option and equals and value):
      raise ValueError(f"{text!r}: options are written (option=value, ...).")
    options[option] = parse_literal(value)
  return name, options


def parse_pair(text: str) -> Pair:
  """Reads a pair.

  Raises:
    ValueError: the text is not of the form component-matrix.

  Example:
    >>> parse_pair("oprf-orf")
    Pair(component='oprf', matrix='orf')
  """
  match = re.fullmatch(rf"({_PART})-({_PART})", text.replace(" ", ""))
  if not match:
    raise ValueError(
      f"{text!r} is not a pair; write component-matrix, as in oprf-orf or "
      "oprf(centred=True)-rom_hybrid(norms=chi)."
    )
  return Pair(match.group(1), match.group(4))


def all_pairs(components: Sequence[str], matrices: Sequence[str]) -> list[Pair]:
  """Pairs every component with every matrix that it can use.

  Raises:
    ValueError: a name or option is unknown, or there is no such pair.

  Example:
    >>> [pair.name for pair in all_pairs(["posrf", "relu"], ["orf", "none"])]
    ['posrf-orf', 'relu-orf']
  """
  pairs = []
  for component in components:
    built = build_component(*split_options(component))
    for matrix in matrices:
      if mismatch(built, WEIGHT_MATRICES.build(*split_options(matrix))) is None:
        pairs.append(Pair(component, matrix))
  if not pairs:
    raise ValueError(
      f"no component of {', '.join(components)} goes with a matrix of "
      f"{', '.join(matrices)}."
    )
  return pairs
