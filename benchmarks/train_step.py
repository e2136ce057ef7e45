"""Measures time and memory of whole training steps of the paper's model.

    python -m benchmarks.train_step

Text is 8 x 4096 tokens, listops 32 x 2048, all of full length; the step is that
of the training loop (dropout 0.1, AdamW, clipping), on one device, and freed
memory is kept as in train.py. Each figure comes from a process of its own.
`cpu_s` is CPU time of all threads, the median of steps after the first;
`--threads=1` keeps the process to one core. `temp_mib` is what the compiled
program plans beside its arguments and results, `first_s` the first step with
compilation, and `input %` the share of time that steps wait for the training
loop's input pipeline (it should be below 2).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

SHAPES = {
  "text": {"batch": 8, "length": 4096, "vocab_size": 257, "num_classes": 2},
  "listops": {"batch": 32, "length": 2048, "vocab_size": 16, "num_classes": 10},
}
PAIRS = ("posrf-orf", "oprf-orf", "oprf-mm", "trigrf-orf")


def prepare(task: str, pair: str, remat: bool = False) -> tuple:
  """Returns the step, its state and dropout key, the data and batch size."""
  import numpy as np

  import spectraformer_jax as sf
  from spectraformer_jax import data

  sizes = dict(SHAPES[task])
  batch_size, length = sizes.pop("batch"), sizes.pop("length")
  fm = sf.feature_map(*pair.split("-"), num_features=128)
  model = sf.nn.Classifier(max_len=length, feature_map=fm, remat=remat, **sizes)
  random = np.random.default_rng(0)
  size = (4 * batch_size, length)
  dataset = data.Dataset.from_sequences(
    random.integers(1, sizes["vocab_size"], size),
    np.zeros(4 * batch_size, int),
    **{"name": task, "length": length, **sizes},
  )
  return *first_step(model, fm), dataset, batch_size


def first_step(model, feature_map) -> tuple:
  """Returns the jitted step, its first state and the dropout key."""
  import functools

  import jax

  from spectraformer_jax.train.config import default_config
  from spectraformer_jax.train.devices import parallel
  from spectraformer_jax.train.step import optim, state, steps

  config = default_config()
  tx = optim.make_optimizer(config.optim, config.train.num_steps)
  keys = state.run_keys(0)
  train_state = state.create(model, feature_map, tx, keys)
  step = functools.partial(steps.train_step, apply_fn=model.apply, tx=tx)
  jitted = jax.jit(
    step, donate_argnums=0, compiler_options=parallel.compiler_options()
  )
  return jitted, train_state, keys.dropout_rng


def make_call(task: str, pair: str) -> Callable[[], None]:
  """Returns a step on one batch, for `peers.py`; compiles at its first call."""
  import jax

  from spectraformer_jax import data

  step, train_state, rng, dataset, batch_size = prepare(task, pair)
  batch = next(data.Batches(dataset, batch_size, seed=0, train=True))

  def call():
    nonlocal train_state
    train_state, _ = step(train_state, batch, rng)
    jax.block_until_ready(train_state)

  return call


def measure(case: argparse.Namespace) -> dict:
  """Measures one case in this process."""
  from benchmarks.processes import use_cores

  if case.threads:
    use_cores(case.threads)
  import jax

  from spectraformer_jax import data
  from spectraformer_jax.train.devices.host_memory import keep_freed_memory

  keep_freed_memory()
  step, train_state, rng, dataset, batch_size = prepare(*case.one, case.remat)
  with data.Prefetch(
    data.Batches(dataset, batch_size, seed=0, train=True)
  ) as batches:
    batch = next(batches)
    start = time.perf_counter()
    step = step.lower(train_state, batch, rng).compile()
    wall, cpu, waited = [], [], []
    for index in range(case.repeats + 1):
      clocks = time.perf_counter(), time.process_time()
      batch = next(batches)
      waited.append(time.perf_counter() - clocks[0])
      train_state, _ = step(train_state, batch, rng)
      jax.block_until_ready(train_state)
      wall.append(time.perf_counter() - clocks[0])
      cpu.append(time.process_time() - clocks[1])
      if index == 0:
        first = time.perf_counter() - start
  return {
    "wall_s": statistics.median(wall[1:]),
    "cpu_s": statistics.median(cpu[1:]),
    "temp_mib": step.memory_analysis().temp_size_in_bytes / 2**20,
    "first_s": first,
    "input": sum(waited[1:]) / sum(wall[1:]),
  }


def main() -> None:
  """Measures each case in a child process and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--tasks", nargs="+", default=SHAPES, choices=SHAPES)
  parser.add_argument("--pairs", nargs="+", default=PAIRS)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument(
    "--threads", type=int, help="cores to use, by default all"
  )
  parser.add_argument(
    "--remat",
    action="store_true",
    help="keep layer inputs alone, as train.remat",
  )
  parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    print(json.dumps(measure(args)))
    return
  from rich.console import Console
  from rich.progress import track
  from rich.table import Table

  table = Table(
    "task", "pair", "CPU s", "wall s", "temp MiB", "first step s", "input %"
  )
  cases = [(task, pair) for task in args.tasks for pair in args.pairs]
  for task, pair in track(cases, "measuring"):
    child = subprocess.run(
      [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        "--one",
        task,
        pair,
        "--repeats",
        str(args.repeats),
        *(["--threads", str(args.threads)] if args.threads else []),
        *(["--remat"] if args.remat else []),
      ],
      capture_output=True,
      text=True,
    )
    if child.returncode:
      print(f"{task} {pair} failed:\n{child.stderr[-800:]}", file=sys.stderr)
      continue
    row = json.loads(child.stdout.splitlines()[-1])
    table.add_row(
      task,
      pair,
      f"{row['cpu_s']:.2f}",
      f"{row['wall_s']:.2f}",
      f"{row['temp_mib']:,.0f}",
      f"{row['first_s']:.1f}",
      f"{100 * row['input']:.2f}",
    )
  Console(width=90).print(table)


if __name__ == "__main__":
  main()
