"""``python -m spectraformer_jax.data {check,fetch} ...``."""

import importlib.util
import sys
from collections.abc import Sequence

USAGE = """\
usage: python -m spectraformer_jax.data check TASK [--data_dir=DIR] ...
       python -m spectraformer_jax.data fetch NAME ...

check   builds a task and says what is in it, and whether it is as in Long Range
        Arena
fetch   installs a data set that stands in for one of Long Range Arena

Each has --help.\
"""
COMMANDS = ("check", "fetch")
USER_ERROR = 2


def main(argv: Sequence[str]) -> int:
  """Runs a command; what is wrong with it is told in one line."""
  if not argv or argv[0] in ("-h", "--help"):
    print(USAGE)
    return 0 if argv else USER_ERROR
  command, *rest = argv
  module = f"spectraformer_jax.data.{command}"
  if command not in COMMANDS or not importlib.util.find_spec(module):
    print(f"error: unknown command {command!r}.\n{USAGE}", file=sys.stderr)
    return USER_ERROR
  try:
    return importlib.import_module(module).main(rest) or 0
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
