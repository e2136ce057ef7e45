"""``python -m package command ...``: one module for each command."""

import importlib.util
import io
import sys
from collections.abc import Sequence

USER_ERROR = 2


def run(
  package: str, commands: Sequence[str], usage: str, argv: Sequence[str]
) -> int:
  """Runs a command; what is wrong with it is told in one line.

  Args:
    package: its modules of the commands' names have ``main(argv)``, which
      returns an exit status or None.
    commands: their names.
    usage: printed on request and after a mistake.
    argv: command and its arguments.

  Returns:
    The exit status.

  Example:
    >>> run("spectraformer_jax.data", ["check"], "usage: check TASK", ["-h"])
    usage: check TASK
    0
  """
  if not argv or argv[0] in ("-h", "--help"):
    print(usage)
    return 0 if argv else USER_ERROR
  command, *rest = argv
  module = f"{package}.{command}"
  if command not in commands or not importlib.util.find_spec(module):
    print(f"error: unknown command {command!r}.\n{usage}", file=sys.stderr)
    return USER_ERROR
  # A name of a file or a text that the terminal cannot show is no mistake.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    return importlib.import_module(module).main(rest) or 0
  except (OSError, ValueError) as error:
    message = " ".join(str(error).split("\n"))
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
