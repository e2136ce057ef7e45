"""How well feature maps approximate attention, on random or your own data."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's arguments."""


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
  raise ValueError("approximation is not there yet.")
