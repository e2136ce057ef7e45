"""Times the Pallas kernels against plain XLA, on a GPU or a TPU.

    python -m benchmarks.pallas --csv=pallas.csv

Runs the kernels of the platform that JAX finds and "xla" on the same arrays. It
prints how far their results differ, and milliseconds of the forward pass and of
forward and backward: the median of repeats after compilation, each until its
results are there, the fastest and the slowest. Where the kernels refuse a
shape, the row says why. On a machine without an accelerator there is nothing to
measure: the script says so and exits with status 1.
"""

import argparse
import csv
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import spectraformer_jax as sf


class Timing(NamedTuple):
  """Milliseconds of one program."""

  median: float
  fastest: float
  slowest: float


class Result(NamedTuple):
  """One row: an implementation with its times, or why it refused the shape."""

  implementation: str
  direction: str
  is_causal: bool
  length: int
  timing: Timing | None
  difference: float | None
  refusal: str | None


def time_calls(function: Callable, arguments, repeats: int) -> Timing:
  """Times a compiled function, after one call without timing."""
  jax.block_until_ready(function(*arguments))
  milliseconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    milliseconds.append(1e3 * (time.perf_counter() - start))
  return Timing(
    statistics.median(milliseconds), min(milliseconds), max(milliseconds)
  )


def measure(
  implementations: Sequence[str],
  *,
  length: int,
  is_causal: bool,
  batch: int,
  heads: int,
  head_dim: int,
  num_features: int,
  dtype: str,
  repeats: int,
) -> list[Result]:
  """Times implementations on the same arrays; compares results to the first's.

  Direction "both" is forward and backward.
  """
  feature_map = sf.feature_map("posrf", "orf", num_features=num_features)
  variables = feature_map.init(
    jax.random.key(0), head_dim=head_dim, num_heads=heads
  )
  shape = batch, length, heads, head_dim
  arrays = [
    jax.random.normal(rng, shape, dtype)
    for rng in jax.random.split(jax.random.key(1), 3)
  ]

  def attend(implementation, *arrays):
    return sf.spectral_attention(
      *arrays,
      feature_map=feature_map,
      variables=variables,
      is_causal=is_causal,
      implementation=implementation,
    )

  def loss(implementation, *arrays):
    out = attend(implementation, *arrays)
    return jnp.sum(jnp.square(out.astype(jnp.float32)))

  results = []
  for direction, function in (
    ("forward", attend),
    ("both", jax.grad(loss, (1, 2, 3))),
  ):
    expected = None
    for name in implementations:
      row = functools.partial(Result, name, direction, is_causal, length)
      jitted = jax.jit(functools.partial(function, name))
      try:
        out = jax.tree.leaves(jitted(*arrays))
      except ValueError as refusal:
        results.append(row(None, None, str(refusal)))
        continue
      expected = expected or out
      results.append(
        row(
          time_calls(jitted, arrays, repeats),
          max(map(_relative_difference, out, expected)),
          None,
        )
      )
  return results


def _relative_difference(actual, expected) -> float:
  """The largest difference over the largest value."""
  actual, expected = (a.astype(jnp.float32) for a in (actual, expected))
  largest = jnp.max(jnp.abs(expected))
  return float(jnp.max(jnp.abs(actual - expected)) / largest)


HEADER = (
  "T",
  "causal",
  "direction",
  "implementation",
  "median, ms",
  "fastest",
  "slowest",
  "difference",
  "refusal",
)


def cells(result: Result) -> list[str]:
  """Formats a line of the table."""
  timing = result.timing
  return [
    str(result.length),
    "yes" if result.is_causal else "no",
    result.direction,
    result.implementation,
    *(["-"] * 3 if timing is None else [f"{ms:.3f}" for ms in timing]),
    "-" if result.difference is None else f"{result.difference:.1e}",
    result.refusal or "",
  ]


def main(argv: Sequence[str] | None = None) -> list[Result]:
  """Measures, prints, writes the CSV of --csv; returns the results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  numbers = lambda text: [int(number) for number in text.split(",")]
  parser.add_argument("--lengths", type=numbers, default=[1024, 4096, 16384])
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--heads", type=int, default=8)
  parser.add_argument("--head_dim", type=int, default=64)
  parser.add_argument("--num_features", type=int, default=128)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--csv", help="file to write")
  args = parser.parse_args(argv)
  backend = jax.default_backend()
  if backend not in ("gpu", "tpu"):
    print(f"The kernels need a GPU or a TPU; JAX runs on {backend!r}.")
    return []
  results = []
  for length in args.lengths:
    for is_causal in (False, True):
      results += measure(
        ("xla", f"pallas_{backend}"),
        length=length,
        is_causal=is_causal,
        batch=args.batch,
        heads=args.heads,
        head_dim=args.head_dim,
        num_features=args.num_features,
        dtype=args.dtype,
        repeats=args.repeats,
      )
  table = Table(
    title=f"{jax.devices()[0].device_kind}, B={args.batch}, N={args.heads}, "
    f"H={args.head_dim}, M={args.num_features}, {args.dtype}"
  )
  for name in HEADER:
    table.add_column(name)
  for result in results:
    table.add_row(*cells(result))
  Console().print(table)
  if args.csv:
    with open(args.csv, "w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(HEADER)
      writer.writerows(cells(result) for result in results)
  return results


if __name__ == "__main__":
  sys.exit(not main())
