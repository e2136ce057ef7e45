"""``python -m spectraformer_jax.study COMMAND ...``."""

import sys
from collections.abc import Sequence

from spectraformer_jax import commands

PACKAGE = "spectraformer_jax.study"
COMMANDS = {
  "approximation": (
    f"{PACKAGE}.approximation.command",
    "measures how well feature maps approximate attention",
  ),
  "sweep": (
    f"{PACKAGE}.sweep.command",
    "trains tasks x attentions x seeds, resumable",
  ),
  "table": (f"{PACKAGE}.sweep.table", "writes the table of a sweep"),
  "plot": (f"{PACKAGE}.sweep.plots", "draws the pictures of a sweep"),
}


def main(argv: Sequence[str]) -> int:
  """Runs a command."""
  return commands.run(PACKAGE, COMMANDS, argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
