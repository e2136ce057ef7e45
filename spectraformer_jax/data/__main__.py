"""``python -m spectraformer_jax.data {check,fetch} ...``."""

import sys
from collections.abc import Sequence

from spectraformer_jax import commands

USAGE = """\
usage: python -m spectraformer_jax.data check TASK [--data_dir=DIR] ...
       python -m spectraformer_jax.data fetch NAME ...

check   builds a task and says what is in it, and whether it is as in Long Range
        Arena
fetch   installs a data set that stands in for one of Long Range Arena

Each has --help.\
"""
COMMANDS = ("check", "fetch")


def main(argv: Sequence[str]) -> int:
  """Runs a command."""
  return commands.run("spectraformer_jax.data.commands", COMMANDS, USAGE, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
