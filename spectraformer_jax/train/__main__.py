"""``python -m spectraformer_jax.train {evaluate,predict} ...``."""

import sys
from collections.abc import Sequence

from spectraformer_jax import commands

USAGE = """\
usage: python -m spectraformer_jax.train evaluate --workdir=DIR ...
       python -m spectraformer_jax.train predict --workdir=DIR [INPUT] ...

evaluate  loss and accuracy of any checkpoint of a run, on any devices
predict   classifies texts or token ids with a trained model

Each has --help. `python train.py` trains.\
"""
COMMANDS = ("evaluate", "predict")


def main(argv: Sequence[str]) -> int:
  """Runs a command."""
  return commands.run("spectraformer_jax.train", COMMANDS, USAGE, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
