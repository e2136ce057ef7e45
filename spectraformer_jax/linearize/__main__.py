"""``python -m spectraformer_jax.linearize --workdir=RUN --out=DIR``."""

import sys
from collections.abc import Sequence

from spectraformer_jax import commands


def main(argv: Sequence[str]) -> int:
  """Converts a model; returns the exit status."""
  from spectraformer_jax.linearize.runs import command

  return commands.call(command.main, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
