"""``python -m spectraformer_jax.train {evaluate,predict} ...``."""

import importlib
import sys
from collections.abc import Sequence

USAGE = """\
usage: python -m spectraformer_jax.train evaluate --workdir=DIR ...
       python -m spectraformer_jax.train predict --workdir=DIR [INPUT] ...

evaluate  loss and accuracy of any checkpoint of a run, on any devices
predict   classifies texts or token ids with a trained model

Each has --help. `python train.py` trains.\
"""
COMMANDS = ("evaluate", "predict")
USER_ERROR = 2


def main(argv: Sequence[str]) -> int:
  """Runs a command; what is wrong with it is told in one line."""
  if not argv or argv[0] in ("-h", "--help"):
    print(USAGE)
    return 0 if argv else USER_ERROR
  command, *rest = argv
  if command not in COMMANDS:
    print(f"error: unknown command {command!r}.\n{USAGE}", file=sys.stderr)
    return USER_ERROR
  module = importlib.import_module(f"spectraformer_jax.train.{command}")
  try:
    module.main(rest)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return USER_ERROR
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
