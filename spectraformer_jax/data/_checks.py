"""Argument checks without jax.

`spectraformer_jax.checks` imports jax, which `spectraformer_jax.data` does not
need.
"""

import operator
from collections.abc import Iterable
from typing import Any

from spectraformer_jax.registry import nearest


def check_int(name: str, number: Any, low: int) -> int:
  """Returns `number` as an int; raises ValueError if it is below `low`."""
  try:
    integer = operator.index(number)
  except TypeError:
    integer = low - 1
  if integer < low or isinstance(number, bool):
    raise ValueError(f"{name} must be an integer >= {low}, got {number!r}.")
  return integer


def check_choice(name: str, choice: Any, known: Iterable[str]) -> None:
  """Raises ValueError, naming the nearest choice, unless `choice` is known."""
  if choice not in tuple(known):  # anything can be looked for in a tuple
    raise ValueError(f"Unknown {name} {choice!r}.{nearest(choice, known)}")
