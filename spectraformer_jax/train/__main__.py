"""``python -m spectraformer_jax.train COMMAND ...``, for trained models.

The script `train.py` trains them.
"""

import sys
from collections.abc import Sequence

from spectraformer_jax import commands

PACKAGE = "spectraformer_jax.train"
COMMANDS = {
  "evaluate": (
    f"{PACKAGE}.evaluate",
    "prints loss and accuracy of any checkpoint of a run",
  ),
  "predict": (
    f"{PACKAGE}.predict",
    "classifies texts or token ids with a trained model",
  ),
}


def main(argv: Sequence[str]) -> int:
  """Runs the command that `argv` names; returns the exit status."""
  return commands.run(PACKAGE, COMMANDS, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
