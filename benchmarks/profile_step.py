"""Profiles the compiled training step: where its time goes.

    python -m benchmarks.profile_step [--task listops] [--pair oprf-orf]

Steps of the paper's model, as `train_step.py` makes them, on one core, traced
by `jax.profiler`. Prints milliseconds a step by part of the model and by pass
(`again`: what the backward pass recomputes), and the operations that take the
most. XLA fuses operations: a fused one counts where the last of its parts
belongs. Tracing itself takes about a tenth of the time.
"""

import argparse
import collections
import re
import tempfile
from pathlib import Path

from benchmarks.processes import use_cores
from benchmarks.train_step import PAIRS, SHAPES, prepare

PASSES = ("forward", "again", "backward", "other")
# Part of the model -> pattern. An operation belongs to the first part whose
# pattern is found in the operation's name.
PARTS = {
  "attention: features and sums": r"jit\(attend\)",
  "attention: query, key, value, output": r"/(query|key|value|out)/",
  "MLP": r"/Dense_\d|gelu",
  "dropout": r"/Dropout_\d",
  "layer norms": r"/(LayerNorm_\d|norm)/",
  "embeddings": r"embedding|TokenEncoder_\d/(add|gather|scatter)",
  "residuals, loops over tokens": r"/layer_\d",
  "head and loss": r"Classifier",
  "optimiser, copies, the rest": "",
}
TOP = 10


def part_of(name: str) -> str:
  """Returns the part of the model that an operation belongs to, by its name.

  Example:
    >>> part_of("jit(train_step)/jvp(Classifier)/encoder/layer_0/Dropout_0/mul")
    'dropout'
  """
  return next(part for part, sign in PARTS.items() if re.search(sign, name))


def pass_of(name: str) -> str:
  """Returns the pass that an operation belongs to, by its name.

  Example:
    >>> pass_of("jit(train_step)/transpose(jvp(Classifier))/norm/reduce_sum")
    'backward'
  """
  if "rematted_computation" in name:
    return "again"
  if "transpose(jvp(Classifier))" in name:
    return "backward"
  return "forward" if "jvp(Classifier)" in name else "other"


def trace(task: str, pair: str, steps: int) -> tuple[dict, dict]:
  """Returns operation -> milliseconds in a step, and -> name in the program."""
  import jax

  from spectraformer_jax import data
  from spectraformer_jax.train.devices.host_memory import keep_freed_memory

  keep_freed_memory()
  step, train_state, rng, dataset, batch_size = prepare(task, pair)
  batch = next(data.Batches(dataset, batch_size, seed=0, train=True))
  step = step.lower(train_state, batch, rng).compile()
  train_state, _ = step(train_state, batch, rng)
  jax.block_until_ready(train_state)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        train_state, _ = step(train_state, batch, rng)
      jax.block_until_ready(train_state)
    (file,) = Path(folder).glob("**/*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(file))
    times = collections.Counter()
    for plane in profile.planes:
      for line in plane.lines:
        for event in line.events:
          operation = dict(event.stats).get("hlo_op")
          # Left out: the operations inside have events of their own.
          if operation and not re.match("while|call|conditional", operation):
            times[operation] += event.duration_ns / 1e6 / steps
  found = re.findall(r'%([\w.-]+) = .*op_name="([^"]*)"', step.as_text())
  return times, dict(found)


def main() -> None:
  """Traces one task and prints both tables."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--task", default="text", choices=SHAPES)
  parser.add_argument("--pair", default=PAIRS[0], choices=PAIRS)
  parser.add_argument("--steps", type=int, default=5)
  args = parser.parse_args()
  use_cores(1)
  times, names = trace(args.task, args.pair, args.steps)
  total = sum(times.values())
  table = collections.Counter()
  for operation, ms in times.items():
    name = names.get(operation, "")
    table[part_of(name), pass_of(name)] += ms

  from rich.console import Console
  from rich.table import Table

  console = Console(width=100)
  parts = Table("part", *PASSES, "share")
  for part in PARTS:
    row = [table[part, kind] for kind in PASSES]
    shown = [f"{ms:.1f}" if ms else "" for ms in row]
    parts.add_row(part, *shown, f"{sum(row) / total:.2f}")
  console.print(f"{args.task}, {args.pair}: {total:.0f} ms a step", parts)
  top = Table("operation", "ms", "share", "name")
  for operation, ms in times.most_common(TOP):
    name = names.get(operation, "")[-60:]
    top.add_row(operation, f"{ms:.1f}", f"{ms / total:.3f}", name)
  console.print(top)


if __name__ == "__main__":
  main()
