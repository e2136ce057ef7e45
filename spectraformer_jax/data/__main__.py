"""Runs ``python -m spectraformer_jax.data COMMAND ...``."""

import sys
from collections.abc import Sequence

from spectraformer_jax import commands

PACKAGE = "spectraformer_jax.data"
COMMANDS = {
  "check": (
    f"{PACKAGE}.commands.check",
    "builds a task and compares it with Long Range Arena",
  ),
  "fetch": (
    f"{PACKAGE}.commands.fetch",
    "installs a stand-in for a data set of Long Range Arena",
  ),
}


def main(argv: Sequence[str]) -> int:
  """Runs the command that the first argument names; returns its exit status."""
  return commands.run(PACKAGE, COMMANDS, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
