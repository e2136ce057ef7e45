"""Parses command-line options of the commands and of the tasks."""

from collections.abc import Sequence
from typing import Any

from spectraformer_jax.commands import Parser, parse_literal


def make_parser(command: str, description: str) -> Parser:
  """Returns a parser with the options that all commands share.

  Args:
    command: name of the command, after ``python -m spectraformer_jax.data``.
    description: what the command does, for ``--help``.
  """
  parser = Parser(
    f"spectraformer_jax.data {command}",
    f"{description}\n\nOptions of the task itself are given as --name=value: "
    "--data_dir=DIR,\n--val=lra, --tokenizer=no_close and the like.",
  )
  parser.add_argument("--cache_dir", help="root of the token cache")
  parser.add_argument("--seed", type=int, default=0)
  return parser


def parse_options(rest: Sequence[str]) -> dict[str, Any]:
  """Returns options of the task from arguments that the parser did not know.

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
    options[name] = text if name == "data_dir" else parse_literal(text)
  return options
