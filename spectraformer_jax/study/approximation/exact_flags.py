"""Flags of commands that choose the keys which attention sees exactly."""

import argparse

from spectraformer_jax import commands
from spectraformer_jax.hybrid_attention.exact_keys import (
  ExactKeys,
  check_heavy,
  exact_keys_of,
)


def add_exact_flags(parser: argparse.ArgumentParser) -> None:
  """Adds ``--window``, ``--num_sinks`` and ``--num_heavy``."""
  flag = parser.add_argument_group("keys that are exact").add_argument
  flag(
    "--window",
    type=commands.parse_literal,
    help="near keys: an int, or LEFT,RIGHT; default none",
  )
  flag("--num_sinks", type=int, default=0, help="first keys; default 0")
  flag("--num_heavy", type=int, default=0, help="heavy keys; default 0")


def exact_keys_from(args: argparse.Namespace, *, is_causal: bool) -> ExactKeys:
  """Returns the exact keys that the flags choose.

  Args:
    args: of a parser with these flags.
    is_causal: whether queries see keys up to their own.

  Raises:
    ValueError: a flag is wrong; the message begins with its name.
  """
  try:
    exact = exact_keys_of(
      args.window, args.num_sinks, args.num_heavy, is_causal=is_causal
    )
    check_heavy(exact, is_causal=is_causal)
  except ValueError as error:
    raise ValueError(f"--{error}") from error
  return exact
