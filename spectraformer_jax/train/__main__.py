"""``python -m spectraformer_jax.train COMMAND ...``; `train.py` trains."""

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
  """Runs a command."""
  return commands.run(PACKAGE, COMMANDS, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
