"""Relative error of each component's kernel estimate, from closed forms.

    python -m benchmarks.kernel_mse --csv=kernel_mse.csv

Queries and keys are N(0, scale^2 I). The expected squared error of an estimate
from M independent rows, over the squared kernel, is computed from
`Component.log_second_moment`; only the inputs are sampled. Data-dependent
parameters are those of the same queries and keys. Columns:

  geo      geometric mean over pairs of the error over that of PosRF
  geo F/M  geo times F/M: the comparison at equal feature dim F
  median   median over pairs of the relative squared error itself

Beside each is a verified reference figure, which holds at the default sizes,
and beside geo its range over seeds: errors grow like exp(|x + y|^2), so two
sets of inputs differ much. The inputs of the reference have a mean |x + y|^2 of
15.6, where 16 is expected. A row whose geo is off by more than a factor of 1.5
is flagged.
"""

import argparse
import csv
import functools
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from spectraformer_jax.components import (
  Component,
  ComponentState,
  build_component,
)
from spectraformer_jax.kernels import KERNELS

TOLERANCE = 1.5  # factor
TABLE_WIDTH = 140
# Enough degrees for the kernel to be exp(x.y) within rounding. The rate is the
# mean of |x| |y| at the default sizes.
SERIES = {"max_degree": 24}
POISSON = SERIES | {"degrees": "poisson", "rate": 8.0}


class ListedComponent(NamedTuple):
  """A component with options, and its reference figures."""

  label: str
  component: str
  options: dict
  geo: float
  geo_equal_width: float
  median: float


class Result(NamedTuple):
  """The figures of a row; all None if no formula is known."""

  row: ListedComponent
  geo: float | None
  geo_range: tuple[float, float] | None
  geo_equal_width: float | None
  median: float | None


ROWS = (
  ListedComponent("posrf", "posrf", {}, 1.0, 1.0, 3.4e4),
  ListedComponent("posrf_hyp", "posrf_hyp", {}, 0.50, 1.0, 1.7e4),
  ListedComponent("trigrf", "trigrf", {}, 0.48, 0.96, 1.7e4),
  ListedComponent("oprf", "oprf", {}, 2.2e-3, 2.2e-3, 89),
  ListedComponent("oprf_hyp", "oprf_hyp", {}, 1.1e-3, 2.2e-3, 45),
  ListedComponent("saderf", "saderf", {}, 2.1e-3, 2.1e-3, 86),
  ListedComponent(
    "saderf, per dimension",
    "saderf",
    {"per_dimension": True},
    2.1e-3,
    2.1e-3,
    86,
  ),
  ListedComponent("aderf", "aderf", {}, 1.4e-3, 1.4e-3, 59),
  ListedComponent("sderf", "sderf", {}, 1.7e-3, 1.7e-3, 73),
  ListedComponent("asderf", "asderf", {}, 1.1e-3, 1.1e-3, 48),
  ListedComponent(
    "posrf, centred",
    "posrf",
    {"centred": True, "statistics": "batch"},
    0.86,
    0.86,
    2.9e4,
  ),
  ListedComponent("poisrf", "poisrf", {}, 0.95, 0.95, 2.1e4),
  ListedComponent("geomrf", "geomrf", {}, 0.30, 0.30, 8.2e3),
  ListedComponent("maclaurin, geometric", "maclaurin", SERIES, 78, 78, 2.1e6),
  ListedComponent(
    "maclaurin, poisson", "maclaurin", POISSON, 0.97, 0.97, 2.4e4
  ),
  ListedComponent("hrf, angular, n=8", "hrf", {}, 1.18, 42, 4.1e4),
)


def log_relative_errors(
  component: Component, query: jax.Array, key: jax.Array, num_rows: int
) -> np.ndarray:
  """Returns the log of (expected squared error / K^2) for every pair.

  Args:
    component: of the softmax kernel K.
    query: ``[T, H]`` float32, scaled.
    key: ``[S, H]`` float32, scaled.
    num_rows: M, the number of independent rows.

  Returns:
    ``[T, S]`` float64.

  Raises:
    NotImplementedError: the component's second moment is not known.
  """
  log_second, mean, kernel = (
    np.asarray(leaf, np.float64) for leaf in _moments(component, query, key)
  )
  second = np.exp(log_second - 2.0 * np.log(kernel))
  # The mean equals the kernel, except for a series that was cut off.
  mean = mean / kernel
  return np.log((second - mean**2) / num_rows + (mean - 1.0) ** 2)


@functools.partial(jax.jit, static_argnums=0)
def _moments(component, query, key):
  """Returns log second moment, mean and softmax kernel of all pairs."""
  stats = ()
  if component.needs_stats:
    stats = component.solve(component.moments(query, key, None, None))
  state = ComponentState({}, {}, stats)
  x, y = query[:, None, :], key[None, :, :]
  return (
    component.log_second_moment(x, y, state),
    component.kernel_value(x, y, state),
    KERNELS["softmax"](x, y),
  )


def measure(
  *, num_rows: int, head_dim: int, num_points: int, scale: float, seeds: int
) -> list[Result]:
  """Measures all rows; takes geometric means over seeds."""
  samples = {row.label: [] for row in ROWS}
  for seed in range(seeds):
    query_rng, key_rng = jax.random.split(jax.random.key(seed))
    query, key = (
      scale * jax.random.normal(rng, (num_points, head_dim))
      for rng in (query_rng, key_rng)
    )
    reference = log_relative_errors(
      build_component("posrf"), query, key, num_rows
    )
    for row in ROWS:
      component = build_component(row.component, row.options)
      try:
        errors = log_relative_errors(component, query, key, num_rows)
      except NotImplementedError:
        continue
      samples[row.label].append(
        (np.mean(errors - reference), np.median(errors))
      )
  return [_result(row, samples[row.label], num_rows, head_dim) for row in ROWS]


def _result(row, samples, num_rows, head_dim) -> Result:
  """Averages the samples of a row over seeds."""
  if not samples:
    return Result(row, None, None, None, None)
  geo, median = np.exp(np.mean(samples, axis=0)).tolist()
  least, most = (math.exp(pick(samples)[0]) for pick in (min, max))
  component = build_component(row.component, row.options)
  width = component.feature_dim(num_rows, head_dim) / num_rows
  return Result(row, geo, (least, most), geo * width, median)


def verdict(result: Result) -> str:
  """Compares geo with the reference: "ok", or the factor between them."""
  if result.geo is None:
    return "no formula"
  off = max(result.geo / result.row.geo, result.row.geo / result.geo)
  return "ok" if off <= TOLERANCE else f"off by a factor {off:.2f}"


HEADER = (
  "component",
  "geo",
  "over seeds",
  "ref. geo",
  "geo F/M",
  "ref. geo F/M",
  "median",
  "ref. median",
  "verdict",
)


def cells(result: Result) -> list[str]:
  """Formats a line of the table."""
  figure = lambda value: "-" if value is None else f"{value:.3g}"
  row = result.row
  return [
    row.label,
    figure(result.geo),
    "-" if result.geo is None else " to ".join(map(figure, result.geo_range)),
    figure(row.geo),
    figure(result.geo_equal_width),
    figure(row.geo_equal_width),
    figure(result.median),
    figure(row.median),
    verdict(result),
  ]


def main(argv: Sequence[str] | None = None) -> list[Result]:
  """Measures, prints, writes the CSV of --csv; returns the results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--num_rows", type=int, default=128)
  parser.add_argument("--head_dim", type=int, default=32)
  parser.add_argument(
    "--num_points", type=int, default=128, help="queries, and as many keys"
  )
  parser.add_argument("--scale", type=float, default=0.5)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--csv", help="file to write")
  args = parser.parse_args(argv)
  results = measure(
    num_rows=args.num_rows,
    head_dim=args.head_dim,
    num_points=args.num_points,
    scale=args.scale,
    seeds=args.seeds,
  )
  print(
    f"Kernel error against PosRF, H={args.head_dim}, M={args.num_rows}, "
    f"scale {args.scale}, {args.num_points}^2 pairs, {args.seeds} seeds\n"
  )
  table = Table(box=box.MARKDOWN)
  for name in HEADER:
    left = name in ("component", "verdict")
    table.add_column(name, justify="left" if left else "right", no_wrap=True)
  for result in results:
    table.add_row(*cells(result))
  Console(width=TABLE_WIDTH).print(table)
  within = sum(verdict(result) == "ok" for result in results)
  print(f"\n{len(results)} rows, {within} within a factor of {TOLERANCE}.")
  if args.csv:
    with open(args.csv, "w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(
        ("component", "geo", "geo_range", "geo_reference", "geo_equal_width")
        + ("geo_equal_width_reference", "median", "median_reference", "verdict")
      )
      writer.writerows(cells(result) for result in results)
  return results


if __name__ == "__main__":
  sys.exit(any(verdict(result) != "ok" for result in main()))
