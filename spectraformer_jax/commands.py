"""``python -m PACKAGE COMMAND ...``: one module for each command."""

import argparse
import ast
import importlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from typing_extensions import override

USER_ERROR, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
  """A parser of a command's flags; mistakes become a ValueError of one line.

  Args:
    program: the package and the command: "spectraformer_jax.study sweep".
    description: for ``--help``, shown as it is.
  """

  def __init__(self, program: str, description: str | None) -> None:
    super().__init__(
      prog=f"python -m {program}",
      description=description,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )

  @override
  def error(self, message: str) -> NoReturn:
    raise ValueError(f"{message}; see --help.")


def run(
  package: str, commands: Mapping[str, tuple[str, str]], argv: Sequence[str]
) -> int:
  """Runs a command; reports user errors in one line.

  Args:
    package: what follows ``python -m``.
    commands: name -> (module, purpose). The module has a ``main(argv)`` that
      returns an exit status or None; ``--help`` shows the purpose.
    argv: command and its arguments.

  Returns:
    The exit status: 0, 2 for a user error, 130 for Ctrl-C, or the command's.

  Example:
    >>> run("some.package", {"check": ("some.module", "checks it")}, ["-h"])
    usage: python -m some.package COMMAND ...
    <BLANKLINE>
      check          checks it
    <BLANKLINE>
    Each command has --help.
    0
  """
  if not argv or argv[0] in ("-h", "--help"):
    print(f"usage: python -m {package} COMMAND ...\n")
    for name, (_, purpose) in commands.items():
      print(f"  {name:14} {purpose}")
    print("\nEach command has --help.")
    return 0 if argv else USER_ERROR
  command, *rest = argv

  def main(argv: Sequence[str]) -> int | None:
    if command not in commands:
      raise ValueError(
        f"unknown command {command!r}; there are {', '.join(commands)}."
      )
    module, _ = commands[command]
    return importlib.import_module(module).main(argv)

  return call(main, rest)


def call(
  main: Callable[[Sequence[str]], int | None], argv: Sequence[str]
) -> int:
  """Calls `main(argv)`; reports user errors in one line.

  Args:
    main: returns an exit status, or None for 0.
    argv: its arguments.

  Returns:
    The exit status: 0, 2 for a user error, 130 for Ctrl-C, or the command's.

  Example:
    >>> call(lambda argv: None, [])
    0
  """
  # Escapes the characters of file names that the terminal cannot show.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    return main(argv) or 0
  except (OSError, ValueError) as error:
    message = " ".join(str(error).split("\n"))
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
  except KeyboardInterrupt:
    print("stopped; the same command goes on from here.", file=sys.stderr)
    return INTERRUPTED


def parse_literal(text: str) -> Any:
  """Returns the value of a text that is a Python literal, else the text.

  Example:
    >>> [parse_literal(text) for text in ("1e-3", "true", "cosine")]
    [0.001, 'true', 'cosine']
  """
  try:
    return ast.literal_eval(text)
  except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
    return text
