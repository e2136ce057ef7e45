"""Direction numbers of the Sobol sequence.

``sobol_directions.npy`` is ``[256, 20]`` uint32, most significant bit first:
those of Joe and Kuo (2008), read off the public interface of scipy 1.17. Point
2**c of the Gray-code order differs from the one before it by direction number
c alone, so that, for every c::

  sobol = scipy.stats.qmc.Sobol(256, scramble=False, bits=30)
  sobol.fast_forward(2**c - 1)  # not for c = 0: the first call would return 0
  before, after = (sobol.random(2) * 2.0**30).astype(np.uint32)
  table[:, c] = (before ^ after) << 2
"""

import functools
import importlib.resources

import numpy as np

MAX_DIM = 256
MAX_BITS = 20


@functools.lru_cache
def sobol_directions() -> np.ndarray:
  """The whole table, ``[MAX_DIM, MAX_BITS]`` uint32, read-only."""
  folder = importlib.resources.files(__package__)
  with folder.joinpath("sobol_directions.npy").open("rb") as file:
    table = np.load(file)
  table.flags.writeable = False
  return table
