"""Path-X of Long Range Arena: Pathfinder at 128 x 128, 16,384 tokens.

The archive holds ``pathfinder128`` twice, and a network trained on one of them
is said never to have beaten chance (long-range-arena issue 38): the one in the
inner ``lra_release`` is read, and a warning names both.

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
  """The task, from files that `data_dir` holds.

  Args:
    seed: of the split by content.
    data_dir: the folder, or one up to three levels above it.

  Raises:
    ValueError: if there are no files.
  """
  return from_files("pathx", 128, seed, data_dir)
