"""Measures trained models whose exact attention is replaced by feature maps.

    python train.py --workdir=runs/digits --config.model.attention=softmax
    python -m benchmarks.swap runs/digits --window=7 --num_heavy=8

Nothing is trained after the swap: each layer gets a map that is drawn, the
default pair and asderf-orf, with and without exact keys. For each run the table
has the accuracy of the model and of the swaps on the test split, the mean of
all draws with the least and the largest, and the share of answers that are
those of the model.
"""

import argparse
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from spectraformer_jax.hybrid_attention.exact_keys import (
  ExactKeys,
  exact_keys_of,
)
from spectraformer_jax.linearize.runs.judge import Verdict, judge
from spectraformer_jax.linearize.runs.outcome import draw_landmark
from spectraformer_jax.linearize.runs.source import Run, capture_run, open_run
from spectraformer_jax.linearize.runs.swap import spectral_config, swap
from spectraformer_jax.nn.pretrained import Pretrained
from spectraformer_jax.study.approximation.inputs import Inputs
from spectraformer_jax.study.approximation.pair_spec import parse_pair
from spectraformer_jax.train.inputs import load_data

PAIRS = ("oprf-orf", "asderf-orf")


class Setting(NamedTuple):
  """What takes the place of exact attention.

  Attributes:
    pair: name of component and weight matrix.
    exact: keys that stay exact.
  """

  pair: str
  exact: ExactKeys

  @property
  def name(self) -> str:
    """For the table."""
    if self.exact == ExactKeys():
      return self.pair
    return f"{self.pair}, exact keys"


def swapped(
  run: Run, layers: list[Inputs], setting: Setting, features: int, seed: int
) -> Pretrained:
  """Returns the model of a run with the maps of one draw."""
  pair = parse_pair(setting.pair)
  config = spectral_config(run.config, pair, features, setting.exact)
  maps = draw_landmark(pair.build(features), layers, jax.random.key(seed))
  return swap(run.teacher, config, run.stored["data"]["train"], maps).pretrained


def measure(
  workdir: pathlib.Path, exact: ExactKeys, features: int, draws: int
) -> dict[str, list[Verdict]]:
  """Returns the verdicts of all draws of each setting, by its name."""
  run = open_run(workdir, "best")
  layers = capture_run(run, examples=1, held_out=1, seed=0).fitted
  test = load_data(run.config)["test"]
  found = {
    "exact attention": [
      judge(run.config, run.teacher, {"": run.teacher}, test)[""]
    ]
  }
  settings = [Setting(pair, x) for x in (ExactKeys(), exact) for pair in PAIRS]
  console = Console(stderr=True)
  for setting in track(settings, workdir.name, console=console):
    models = {
      str(seed): swapped(run, layers, setting, features, seed)
      for seed in range(draws)
    }
    verdicts = judge(run.config, run.teacher, models, test)
    found[setting.name] = list(verdicts.values())
  return found


def print_table(name: str, found: dict[str, list[Verdict]]) -> None:
  """Prints a line for each setting."""
  table = Table("attention", "test accuracy", "least, largest", "same answers")
  for setting, verdicts in found.items():
    accuracy = 100 * np.array([verdict.accuracy for verdict in verdicts])
    same = 100 * np.mean([verdict.same_answers for verdict in verdicts])
    table.add_row(
      setting,
      f"{accuracy.mean():.1f} %",
      f"{accuracy.min():.1f}, {accuracy.max():.1f}",
      f"{same:.1f} %",
    )
  table.title = name
  Console(width=100).print(table)


def main() -> None:
  """Reads the flags and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
  parser.add_argument("--window", type=int, default=63)
  parser.add_argument("--num_heavy", type=int, default=32)
  parser.add_argument("--num_features", type=int, default=128)
  parser.add_argument("--draws", type=int, default=3)
  args = parser.parse_args()
  exact = exact_keys_of(args.window, 0, args.num_heavy, is_causal=False)
  for workdir in args.workdirs:
    found = measure(workdir, exact, args.num_features, args.draws)
    print_table(workdir.name, found)


if __name__ == "__main__":
  main()
