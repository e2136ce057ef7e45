"""Random generators from a seed: every seed below 2**64 gives another one.

Of the data package as well, so jax is imported where it is needed.
"""

import operator
from typing import Any

import numpy as np

_WORD = 2**32


def check_seed(name: str, seed: Any) -> int:
  """`seed` as an int; ValueError unless it is one from 0 to 2**64 - 1.

  Example:
    >>> check_seed("seed", 2**64)
    Traceback (most recent call last):
      ...
    ValueError: seed must be below 2**64, got 18446744073709551616.
  """
  try:
    integer = operator.index(seed)
  except TypeError:
    integer = -1
  if integer < 0 or isinstance(seed, bool):
    raise ValueError(f"{name} must be an integer >= 0, got {seed!r}.")
  if integer >= 2**64:
    raise ValueError(f"{name} must be below 2**64, got {seed}.")
  return integer


def make_key(seed: int):
  """JAX's key of a seed, of which `jax.random.key` drops the high word.

  With `jax_enable_x64` it drops nothing, and this is the same key; below 2**32
  the two are equal without it.

  Example:
    >>> from jax.random import key_data
    >>> key_data(make_key(2**32 + 5)).tolist()
    [1, 5]
  """
  import jax

  with jax.enable_x64(True):
    return jax.random.key(np.uint64(check_seed("seed", seed)))


def make_generator(seed: int, index: int) -> np.random.Generator:
  """Numpy's generator of one of several streams of a seed.

  `numpy.random.default_rng([seed, index])` reads a list as 32-bit words without
  their ends, so that [2**32 + 5, 0] is [5, 1]; here the high word comes last.

  Args:
    seed: below 2**64.
    index: of the stream, below 2**32.

  Example:
    >>> draw = lambda *words: make_generator(*words).integers(1000)
    >>> draw(2**32 + 5, 0) != draw(5, 1)
    True
  """
  high, low = divmod(check_seed("seed", seed), _WORD)
  return np.random.default_rng([low, index, high] if high else [seed, index])
