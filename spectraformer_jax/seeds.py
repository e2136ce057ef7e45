"""Makes random generators; different seeds below 2**64 give different ones.

The data package uses this module without JAX, so only `make_key` imports jax.
"""

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  import jax

_WORD = 2**32


def check_seed(name: str, seed: Any) -> int:
  """Returns `seed` as an int; raises ValueError unless 0 <= seed < 2**64.

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


def make_key(seed: int) -> "jax.Array":
  """Returns the PRNG key of a 64-bit seed.

  `jax.random.key` drops the high 32 bits of a seed unless `jax_enable_x64` is
  set. With that option, or for a seed below 2**32, both return the same key.

  Example:
    >>> from jax.random import key_data
    >>> key_data(make_key(2**32 + 5)).tolist()
    [1, 5]
  """
  import jax

  with jax.enable_x64(True):
    return jax.random.key(np.uint64(check_seed("seed", seed)))


def make_generator(seed: int, index: int) -> np.random.Generator:
  """Returns NumPy's generator of one of several streams of a seed.

  `numpy.random.default_rng([seed, index])` concatenates the 32-bit words of its
  list, so [2**32 + 5, 0] gives the same stream as [5, 1]. Here the high word of
  the seed comes last, which keeps streams apart.

  Args:
    seed: below 2**64.
    index: number of the stream, below 2**32.

  Example:
    >>> draw = lambda *words: make_generator(*words).integers(1000)
    >>> bool(draw(2**32 + 5, 0) != draw(5, 1))
    True
  """
  high, low = divmod(check_seed("seed", seed), _WORD)
  return np.random.default_rng([low, index, high] if high else [seed, index])
