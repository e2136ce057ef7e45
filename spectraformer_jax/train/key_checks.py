"""Checks of single values of a configuration."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from spectraformer_jax.checks import check_positive_int

# `check(name, value)` raises ValueError unless the key may have the value.
Check = Callable[[str, Any], object]

# Arguments of `data.load` that cannot be among the options of the task: those
# with a key of their own in config.task, and those that the run passes itself.
_TASK_KEYS = ("seed", "tokenizer", "cache_dir")
_PASSED_BY_THE_RUN = ("task", "split", "progress")


def must_be(expected: str, is_valid: Callable[[Any], bool]) -> Check:
  """Makes a check: the value must be what `expected` says."""

  def check(name: str, value: Any) -> None:
    if not is_valid(value):
      raise ValueError(f"{name} must be {expected}, got {value!r}.")

  return check


def one_of(*choices: Any) -> Check:
  """Makes a check: the value must be one of `choices`."""
  expected = f"one of {', '.join(map(str, choices))}"
  return must_be(expected, lambda x: x in choices)


def number(expected: str, is_valid: Callable[[float], bool]) -> Check:
  """Makes a check: the value must be a finite number that is valid."""
  return must_be(expected, lambda x: is_finite(x) and is_valid(x))


def count(expected: str) -> Check:
  """Makes a check: the value must be an integer of 0 or more."""
  return number(expected, lambda x: isinstance(x, numbers.Integral) and x >= 0)


def is_finite(x: Any) -> bool:
  """Whether `x` is a finite number, which a bool is not."""
  is_number = isinstance(x, numbers.Real) and not isinstance(x, bool)
  return is_number and math.isfinite(x)


def check_buckets(name: str, buckets: Any) -> None:
  """Refuses what is not a tuple of positive integers."""
  if not isinstance(buckets, tuple | list):
    raise ValueError(f"{name} must be a tuple of lengths, got {buckets!r}.")
  for bucket in buckets:
    check_positive_int(name, bucket)


def check_options(section: str, options: Any) -> None:
  """Checks that options are flat; the part that gets them checks the values."""
  if not isinstance(options, Mapping):
    raise ValueError(f"{section} must be options by name, got {options!r}.")
  for name, value in options.items():
    if isinstance(value, Mapping):
      raise ValueError(
        f"{section}.{name} must be a number, text or tuple, got "
        f"{dict(value)!r}."
      )
    if section == "config.task.kwargs" and name in _TASK_KEYS:
      raise ValueError(
        f"{section} cannot have {name!r}; set config.task.{name}."
      )
    if section == "config.task.kwargs" and name in _PASSED_BY_THE_RUN:
      raise ValueError(
        f"{section} cannot have {name!r}: the run passes it itself."
      )
