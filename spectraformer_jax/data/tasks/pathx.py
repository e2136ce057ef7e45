"""Path-X of Long Range Arena: Pathfinder at 128 x 128, 16,384 tokens.

The archive holds two folders ``pathfinder128``. A user reported to the authors
of Long Range Arena that a network did not beat chance on one of them, and did
not say which. The folder in the inner ``lra_release`` is read, and a warning
names both.

Source: Tay et al., "Long Range Arena", 2021, section 2.2.6.
"""

import os

from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import Source
from spectraformer_jax.data.tasks.pathfinder import from_files


@TASKS.register("pathx")
def pathx(
  *, seed: int = 0, data_dir: str | os.PathLike | None = None
) -> Source:
  """Returns the task, from the files in `data_dir`.

  Args:
    seed: seed of the split by content.
    data_dir: the folder of the files, or one up to three levels above it.

  Raises:
    ValueError: if the files are missing.
  """
  return from_files("pathx", 128, seed, data_dir)
