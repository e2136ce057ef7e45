"""Checks arguments without jax.

`spectraformer_jax.checks` imports jax, which `spectraformer_jax.data` does not
need.
"""

import operator
from typing import Any


def check_int(name: str, number: Any, low: int) -> int:
  """Returns an integer >= `low` as an int; raises ValueError for any other."""
  try:
    integer = operator.index(number)
  except TypeError:
    integer = low - 1
  if integer < low or isinstance(number, bool):
    raise ValueError(f"{name} must be an integer >= {low}, got {number!r}.")
  return integer
