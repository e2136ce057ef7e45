"""Checks arguments without jax.

`spectraformer_jax.checks` imports jax, which `spectraformer_jax.data` does not
need.
"""

import operator
from collections.abc import Iterable
from typing import Any

from spectraformer_jax.registry import nearest


def check_int(name: str, number: Any, low: int) -> int:
  """Returns an integer >= `low` as an int; raises ValueError for any other."""
  try:
    integer = operator.index(number)
  except TypeError:
    integer = low - 1
  if integer < low or isinstance(number, bool):
    raise ValueError(f"{name} must be an integer >= {low}, got {number!r}.")
  return integer


def check_choice(name: str, choice: Any, choices: Iterable[str]) -> None:
  """Raises ValueError, with a near choice, unless `choices` has `choice`."""
  if choice not in tuple(choices):  # a tuple can look for unhashable ones
    raise ValueError(f"Unknown {name} {choice!r}.{nearest(choice, choices)}")
