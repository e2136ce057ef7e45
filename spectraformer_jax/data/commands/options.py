"""Options of a task on the command line."""

import argparse
import ast
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
  """A parser whose complaints are a ValueError, told in one line."""

  def error(self, message):
    """Raises what argparse would print with its usage."""
    raise ValueError(f"{message}; see --help.")


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
  """A parser with the options that all commands share.

  Args:
    command: what follows ``python -m spectraformer_jax.data``.
    description: what it does, for ``--help``.
  """
  parser = Parser(
    prog=f"python -m spectraformer_jax.data {command}",
    description=(
      f"{description} Options of the task itself are given as --name=value: "
      "--data_dir=DIR, --val=lra, --tokenizer=no_close and the like."
    ),
    allow_abbrev=False,
  )
  parser.add_argument("--cache_dir", help="root of the token cache")
  parser.add_argument("--seed", type=int, default=0)
  return parser


def parse_options(rest: Sequence[str]) -> dict[str, Any]:
  """What a parser did not know, as options of the task.

  Example:
    >>> parse_options(["--max-len=500", "--data_dir=7", "--val=lra"])
    {'max_len': 500, 'data_dir': '7', 'val': 'lra'}
  """
  options = {}
  for argument in rest:
    name, equals, text = argument.partition("=")
    if not name.startswith("--") or not equals:
      raise ValueError(
        f"options must be written --name=value, got {argument!r}."
      )
    name = name[2:].replace("-", "_")
    options[name] = text if name == "data_dir" else _value(text)
  return options


def _value(text: str) -> Any:
  """A number where the text is one."""
  try:
    return ast.literal_eval(text)
  except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
    return text
