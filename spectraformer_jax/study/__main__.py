"""``python -m spectraformer_jax.study {approximation,...} ...``."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from spectraformer_jax.study.approximation import command as approximation
from spectraformer_jax.study.sweep import command as sweep
from spectraformer_jax.study.sweep import plots, table

# Name of a command -> module with add_arguments(parser) and run(args); the
# first line of its docstring is its help.
COMMANDS = {
  "approximation": approximation,
  "sweep": sweep,
  "table": table,
  "plot": plots,
}
USER_ERROR, INTERRUPTED = 2, 130


def make_parser() -> argparse.ArgumentParser:
  """The parser of all commands."""
  parser = argparse.ArgumentParser(
    prog="python -m spectraformer_jax.study",
    description="Measures and compares attention kernels.",
  )
  commands = parser.add_subparsers(
    dest="command", metavar="COMMAND", required=True
  )
  for name, module in COMMANDS.items():
    command = commands.add_parser(
      name,
      help=module.__doc__.splitlines()[0],
      description=module.__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(command)
    command.set_defaults(run=module.run)
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; what is wrong with it is told in one line."""
  argv = sys.argv[1:] if argv is None else list(argv)
  args = make_parser().parse_args(argv)
  # For reports: what gives the same again.
  args.typed = shlex.join(["python", "-m", "spectraformer_jax.study", *argv])
  try:
    return args.run(args) or 0
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return USER_ERROR
  except KeyboardInterrupt:
    print("stopped; the same command goes on from here.", file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
  sys.exit(main())
