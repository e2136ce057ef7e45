"""Error of kernel estimates with each weight matrix, against iid rows.

    python benchmarks/weight_matrix_mse.py --csv=weight_matrix_mse.csv
    python benchmarks/weight_matrix_mse.py --draw_time --csv=draw_time.csv

The first prints, for the trigonometric (trig) and the positive (pos) estimate
of the softmax kernel at scales 0.2 and 0.1, the mean over pairs x, y ~
N(0, scale^2 I) of the mean squared error, divided by the variance of as many
iid Gaussian rows in closed form, beside verified reference figures. Those are
for the default sizes. A figure off by more than 15 % (pos at 0.2, whose tails
are heavy: 30 %) is flagged; "+-" is one standard error of the largest relative
one of the four. The second prints the milliseconds that the rows of 8 heads,
M=256, H=64 take to draw once compiled.
"""

import argparse
import contextlib
import csv
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from spectraformer_jax.weight_matrices import (
  WEIGHT_MATRICES,
  WeightMatrix,
  get_row_law,
)

COLUMNS = ("trig.2", "trig.1", "pos.2", "pos.1")
SCALES = (0.2, 0.1)
TOLERANCES = (0.15, 0.15, 0.30, 0.15)
HEADS, DRAW_ROWS, DRAW_DIM = 8, 256, 64
DRAW_LIMIT_MS = 50.0
SLOW_TO_DRAW = ("lhs", "nomc", "ssf")  # without a limit
BATCH = 50  # draws at once

# Reference ratios: row -> (M=32, M=128), each in the order of COLUMNS.
REFERENCE = {
  "iid": ((0.996, 0.997, 0.992, 1.001), (1.000, 0.999, 0.987, 1.002)),
  "antithetic": ((2.002, 2.000, 0.856, 0.475), (1.997, 1.998, 0.896, 0.473)),
  "orf": ((0.378, 0.089, 0.762, 0.803), (0.377, 0.089, 0.765, 0.798)),
  "orf_sqrtd": ((0.364, 0.025, 0.358, 0.720), (0.407, 0.029, 0.376, 0.721)),
  "orf_antithetic": (
    (1.397, 1.121, 0.728, 0.283),
    (0.756, 0.178, 0.499, 0.076),
  ),
  "orf_sqrtd_anti": (
    (1.396, 1.017, 0.287, 0.208),
    (0.758, 0.053, 0.128, 0.012),
  ),
  "orf_pnc": ((0.358, 0.060, 0.906, 0.795), (0.356, 0.060, 0.751, 0.796)),
  "orf_strat": ((0.358, 0.060, 0.857, 0.796), (0.357, 0.059, 0.796, 0.796)),
  "simrf": ((0.398, 0.118, 0.544, 0.125), (0.396, 0.119, 0.605, 0.127)),
  "simrf_plus": ((0.408, 0.142, 0.637, 0.110), (0.410, 0.144, 0.565, 0.109)),
  "nomc": (None, (0.432, 0.096, 0.483, 0.086)),
  "sorf": ((0.364, 0.025, 0.366, 0.722), (0.407, 0.029, 0.378, 0.718)),
  "sorf_chi": ((0.380, 0.090, 0.750, 0.801), (0.378, 0.090, 0.789, 0.801)),
  "sorf_k2": ((0.366, 0.025, 0.364, 0.722), (0.408, 0.030, 0.375, 0.718)),
  "rom_hybrid_left": (
    (0.863, 0.740, 0.544, 0.854),
    (0.388, 0.029, 0.435, 0.736),
  ),
  "rom_hybrid_chi": (
    (0.689, 0.555, 0.834, 0.913),
    (0.397, 0.128, 0.832, 0.805),
  ),
  "butterfly": ((0.377, 0.088, 0.768, 0.801), (0.375, 0.088, 0.782, 0.807)),
  "fastfood": ((1.595, 1.818, 1.124, 1.186), (1.590, 1.817, 1.159, 1.180)),
  "scrf": ((1.619, 1.919, 1.226, 1.199), (1.641, 1.964, 1.295, 1.235)),
  "scrf_chi": ((0.975, 0.963, 0.982, 0.995), (0.994, 0.986, 0.975, 1.011)),
  "circulant_nosign": (
    (1.574, 1.853, 1.158, 1.292),
    (1.618, 1.933, 1.246, 1.332),
  ),
  "pm_toeplitz": ((1.394, 1.606, 1.230, 1.147), (1.531, 1.806, 1.170, 1.161)),
  "toeplitz_chi": ((0.975, 0.964, 1.027, 0.991), (0.970, 0.956, 0.948, 0.992)),
  "pm_ldr": ((1.444, 1.732, 1.418, 1.211), (1.408, 1.637, 1.378, 1.149)),
  "sobol_shift": ((0.904, 0.855, 0.710, 0.324), (0.485, 0.242, 0.611, 0.141)),
  "sobol_lms": ((1.122, 1.119, 0.726, 0.311), (0.668, 0.459, 0.584, 0.147)),
  "sobol_owen": ((1.128, 1.130, 0.709, 0.311), (0.660, 0.452, 0.525, 0.144)),
  "halton_shift": ((2.993, 3.329, 2.667, 4.532), (3.058, 3.329, 1.851, 1.511)),
  "lattice": ((1.461, 1.518, 0.909, 0.475), (1.635, 1.657, 0.989, 0.476)),
  "lhs": ((0.968, 0.948, 0.786, 0.291), (0.952, 0.931, 0.755, 0.276)),
  "mm": (None, (0.377, 0.031, 0.364, 0.058)),
  "mm_chi": (None, (0.390, 0.130, 0.566, 0.134)),
  "mm_anti": (None, (0.749, 0.058, 0.186, 0.015)),
  "ssf": (None, (0.483, 0.070, 0.510, 0.076)),
  "ssf_chi": (None, (0.506, 0.101, 0.491, 0.081)),
  "gq_L2": ((1.025, 0.966, 0.540, 0.922), (1.074, 0.971, 0.547, 0.912)),
  "gq_L3": ((1.001, 1.006, 0.909, 1.009), (1.005, 1.009, 0.903, 1.007)),
  "gq_L8": ((0.998, 0.996, 0.938, 1.005), (1.003, 1.006, 0.972, 0.995)),
  "sgq2": ((38.03, 1.027, 0.582, 0.121), (38.03, 1.027, 0.582, 0.121)),
  "sgq2_rot": ((38.10, 1.027, 0.582, 0.120), (38.09, 1.027, 0.582, 0.120)),
  "ssr": ((0.983, 0.116, 0.461, 0.118), (0.958, 0.087, 0.543, 0.091)),
  "ssr_sym": ((1.973, 1.078, 0.534, 0.266), (1.901, 0.172, 0.405, 0.045)),
  "ssr_pos": ((1.066, 1.131, 1.424, 0.380), (1.101, 1.105, 0.704, 0.323)),
  "sr_omc": ((1.309, 0.993, 1.149, 1.663), (0.660, 0.051, 0.925, 1.458)),
  "sparse_q4": ((1.462, 1.253, 1202.0, 2.626), (3.029, 1.444, 413.0, 2.404)),
  "sparse_q8": ((1.094, 1.102, 39.54, 1.391), (1.434, 1.139, 45.96, 1.406)),
  "sparse_q4_hd_chi": (
    (1.061, 1.004, 0.951, 0.996),
    (1.248, 1.024, 1.046, 1.012),
  ),
  "is_1.1": ((1.821, 5.916, 0.759, 1.774), (1.825, 5.966, 0.750, 1.790)),
}


class Row(NamedTuple):
  """A weight matrix with options, the reference row, and what to know."""

  matrix: str
  options: dict
  reference: str
  note: str = ""

  @property
  def label(self) -> str:
    """The matrix with its options."""
    options = ", ".join(f"{k}={v}" for k, v in self.options.items())
    return f"{self.matrix}({options})" if options else self.matrix


class Result(NamedTuple):
  """Ratios of one row, their standard errors and references, ``[4]`` each."""

  row: Row
  num_rows: int
  ratios: np.ndarray
  errors: np.ndarray
  reference: np.ndarray


STARTS = "starts as its base"
ROWS = (
  Row("iid", {}, "iid"),
  Row("antithetic", {}, "antithetic"),
  Row("orf", {}, "orf"),
  Row("orf_sqrtd", {}, "orf_sqrtd"),
  Row("orf_antithetic", {}, "orf_antithetic"),
  Row("orf_sqrtd_anti", {}, "orf_sqrtd_anti"),
  Row("orf_pnc", {}, "orf_pnc"),
  Row("orf_strat", {}, "orf_strat"),
  Row("simrf", {}, "simrf"),
  Row("simrf_plus", {}, "simrf_plus"),
  Row("nomc", {}, "nomc"),
  Row("sorf", {}, "sorf"),
  Row("sorf", {"norms": "chi"}, "sorf_chi"),
  Row("rom", {}, "sorf", "three factors are sorf"),
  Row("rom", {"num_factors": 2}, "sorf_k2"),
  Row("rom_hybrid", {}, "rom_hybrid_left", "outermost unit-circle factor"),
  Row("rom_hybrid", {"norms": "chi"}, "rom_hybrid_chi"),
  Row("butterfly", {}, "butterfly"),
  Row("fastfood", {}, "fastfood"),
  Row("scrf", {}, "scrf"),
  Row("scrf_chi", {}, "scrf_chi"),
  Row("pmodel", {}, "pm_toeplitz"),
  Row("pmodel", {"norms": "chi"}, "toeplitz_chi"),
  Row("pmodel_toeplitz", {}, "pm_toeplitz"),
  Row("pmodel_hankel", {}, "pm_toeplitz", "toeplitz, rows reversed"),
  Row("pmodel_circulant", {}, "circulant_nosign", "inputs are mixed first"),
  Row("pmodel_ldr", {}, "pm_ldr"),
  Row("qmc", {}, "sobol_shift"),
  Row("qmc", {"scrambling": "lms"}, "sobol_lms"),
  Row("qmc", {"scrambling": "owen"}, "sobol_owen"),
  Row("qmc_sobol", {}, "sobol_shift"),
  Row("qmc_halton", {}, "halton_shift"),
  Row("qmc_lattice", {}, "lattice", "known departure"),
  Row("lhs", {}, "lhs"),
  Row("mm", {}, "mm"),
  Row("mm_chi", {}, "mm_chi"),
  Row("mm_anti", {}, "mm_anti"),
  Row("ssf", {}, "ssf"),
  Row("ssf", {"norms": "chi"}, "ssf_chi"),
  Row("gq", {"num_nodes": 2}, "gq_L2"),
  Row("gq", {"num_nodes": 3}, "gq_L3"),
  Row("gq", {}, "gq_L8"),
  Row("sgq", {}, "sgq2"),
  Row("sgq", {"rotate": True}, "sgq2_rot"),
  Row("ssr", {}, "ssr"),
  Row("ssr", {"symmetric": True}, "ssr_sym"),
  Row("ssr_pos", {}, "ssr_pos"),
  Row("sr_omc", {}, "sr_omc"),
  Row("sparse", {}, "sparse_q4", "known departure"),
  Row("sparse", {"nonzeros": 8}, "sparse_q8", "known departure"),
  Row("sparse", {"hadamard": True}, "sparse_q4_hd_chi"),
  Row("importance", {}, "is_1.1"),
  Row("fastfood_learnable", {}, "fastfood", STARTS),
  Row("gmm", {}, "orf", "its components start apart"),
  Row("cov", {}, "orf", STARTS),
  Row("generator", {}, "orf", STARTS),
  Row("bbq", {}, "orf", STARTS),
  Row("flow", {}, "orf", STARTS),
  Row("variational", {"context": "learned"}, "orf", STARTS),
  Row("learned_orf", {}, "orf", STARTS),
  Row("learned_radial", {}, "orf_strat", STARTS),
)


def draw_rows(
  matrix: WeightMatrix, rng: jax.Array, num_rows: int, head_dim: int
):
  """A `WeightSample` of new parameters (a learner's) and a new draw."""
  init_rng, draw_rng = jax.random.split(rng)
  law = get_row_law("gaussian")
  return matrix.rows(
    matrix.init(init_rng, num_rows, head_dim),
    matrix.draw(draw_rng, num_rows, head_dim, law),
  )


def error_ratios(
  matrix: WeightMatrix, num_rows: int, *, head_dim: int, pairs: int, draws: int
) -> np.ndarray:
  """Squared errors over the variance of iid rows, averaged over pairs.

  Args:
    matrix: W.
    num_rows: M.
    head_dim: H.
    pairs: to average over, new ones for each draw: the ratios of the better
      matrices grow with |x - y|^2, and one set of pairs is not like another.
    draws: R.

  Returns:
    ``[R, 4]``, in the order of `COLUMNS`.
  """

  def one_draw(rng):
    rng, pair_rng = jax.random.split(rng)
    x, y = jax.random.normal(pair_rng, (2, pairs, head_dim))
    apart = jnp.sum(jnp.square(x - y), axis=-1)
    together = jnp.sum(jnp.square(x + y), axis=-1)
    sample = draw_rows(matrix, rng, num_rows, head_dim)
    weight = jnp.full((num_rows,), 1.0 / num_rows)
    if sample.log_weight is not None:
      weight = weight * jnp.exp(sample.log_weight)
    if sample.sign is not None:
      weight = weight * sample.sign
    project = lambda z: jnp.einsum(
      "mh,ph->mp", sample.w, z, precision="highest"
    )
    angles, exponents = project(x - y), project(x + y)
    trig, pos = [], []
    for scale in SCALES:
      # Both estimates over their kernels, and their variances with iid rows.
      s, t = scale**2 * apart, scale**2 * together
      ratio = weight @ jnp.cos(scale * angles) * jnp.exp(0.5 * s)
      variance = 2.0 * jnp.square(jnp.sinh(0.5 * s)) / num_rows
      trig.append(jnp.mean(jnp.square(ratio - 1.0) / variance))
      ratio = weight @ jnp.exp(scale * exponents - 0.5 * t[None, :])
      variance = jnp.expm1(t) / num_rows
      pos.append(jnp.mean(jnp.square(ratio - 1.0) / variance))
    return jnp.stack(trig + pos)

  run = jax.jit(lambda rngs: jax.lax.map(one_draw, rngs, batch_size=BATCH))
  rngs = jax.random.split(jax.random.key(1), draws)
  return np.asarray(run(rngs), np.float64)


def measure(
  rows: Sequence[Row],
  sizes: Sequence[int],
  *,
  head_dim: int,
  pairs: int,
  draws: int,
):
  """Yields the `Result` of each row and size that fit."""
  for row in rows:
    matrix = WEIGHT_MATRICES.build(row.matrix, row.options)
    for place, size in enumerate(sizes):
      num_rows = 2 * head_dim + 1 if row.matrix == "sgq" else size
      try:
        matrix.check(num_rows, head_dim)
      except ValueError:
        continue
      samples = error_ratios(
        matrix, num_rows, head_dim=head_dim, pairs=pairs, draws=draws
      )
      reference = REFERENCE[row.reference][min(place, 1)]
      yield Result(
        row,
        num_rows,
        samples.mean(axis=0),
        samples.std(axis=0) / np.sqrt(draws),
        np.array(reference if reference else [np.nan] * 4),
      )
      if row.matrix == "sgq":
        break  # its number of rows is fixed


def outside(result: Result) -> list[str]:
  """Columns that are off by more than their tolerance."""
  off = np.abs(result.ratios / result.reference - 1.0)
  return [
    name
    for name, value, limit in zip(COLUMNS, off, TOLERANCES, strict=True)
    if value > limit
  ]


def verdict(result: Result) -> str:
  """Which columns are outside tolerance, and what to know of the row."""
  if np.isnan(result.reference).any():
    words = "no reference"
  else:
    words = ", ".join(outside(result)) or "ok"
  return f"{words} ({result.row.note})" if result.row.note else words


def draw_milliseconds(
  matrix: WeightMatrix, num_rows: int, head_dim: int, heads: int
) -> float:
  """Least of ten times that all heads' rows take, compiled."""

  @jax.jit
  def draw(rng):
    one_head = lambda rng: draw_rows(matrix, rng, num_rows, head_dim).w
    return jax.vmap(one_head)(jax.random.split(rng, heads))

  rngs = jax.random.split(jax.random.key(0), 11)
  jax.block_until_ready(draw(rngs[0]))
  seconds = []
  for rng in rngs[1:]:
    start = time.perf_counter()
    jax.block_until_ready(draw(rng))
    seconds.append(time.perf_counter() - start)
  return 1e3 * min(seconds)


def time_draws(rows: Sequence[Row]) -> Iterator[list[str]]:
  """Lines of the table of draw times, the header first."""
  yield ["matrix", "ms", "limit", "verdict"]
  for row in rows:
    matrix = WEIGHT_MATRICES.build(row.matrix, row.options)
    num_rows = 2 * DRAW_DIM + 1 if row.matrix == "sgq" else DRAW_ROWS
    ms = draw_milliseconds(matrix, num_rows, DRAW_DIM, HEADS)
    free = row.matrix in SLOW_TO_DRAW
    limit = "-" if free else f"{DRAW_LIMIT_MS:g}"
    late = not free and ms > DRAW_LIMIT_MS
    yield [row.label, f"{ms:.2f}", limit, "too slow" if late else "ok"]


def compare_errors(results: Iterable[Result]) -> Iterator[list[str]]:
  """Lines of the table of ratios beside references, the header first."""
  pairs = [h for c in COLUMNS for h in (c, f"ref. {c}")]
  yield ["matrix", "M", *pairs, "+-", "verdict"]
  for result in results:
    figures = [
      f"{value:.3f}"
      for both in zip(result.ratios, result.reference, strict=True)
      for value in both
    ]
    relative = np.max(result.errors / result.ratios)
    yield [
      result.row.label,
      str(result.num_rows),
      *figures,
      f"{relative:.0%}",
      verdict(result),
    ]


def _print_table(console, title, lines):
  """A table whose figures stand to the right."""
  table = Table(title=title)
  for name in lines[0]:
    left = name in ("matrix", "verdict")
    table.add_column(name, justify="left" if left else "right")
  for line in lines[1:]:
    table.add_row(*line)
  console.print(table)


def main(argv: Sequence[str] | None = None) -> list[list[str]]:
  """Measures, prints and, if asked to, writes CSV.

  Returns:
    The table as printed, the header first.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--matrices", nargs="*", help="names; all if left out")
  parser.add_argument("--draws", type=int, default=2000)
  parser.add_argument("--pairs", type=int, default=64, help="in each draw")
  parser.add_argument("--head_dim", type=int, default=32)
  parser.add_argument("--sizes", type=int, nargs=2, default=(32, 128))
  parser.add_argument("--draw_time", action="store_true")
  parser.add_argument("--csv", help="file to write")
  args = parser.parse_args(argv)
  for name in args.matrices or ():
    WEIGHT_MATRICES.get(name)
  rows = [
    row for row in ROWS if not args.matrices or row.matrix in args.matrices
  ]
  if args.draw_time:
    title = f"Drawing W: {HEADS} heads, M={DRAW_ROWS}, H={DRAW_DIM}"
    stream = time_draws(rows)
  else:
    title = f"MSE against iid rows, H={args.head_dim}, {args.draws} draws"
    sizes = {k: getattr(args, k) for k in ("head_dim", "pairs", "draws")}
    stream = compare_errors(measure(rows, args.sizes, **sizes))
  console, lines = Console(), []
  with contextlib.ExitStack() as stack:
    status = stack.enter_context(console.status("compiling"))
    if args.csv:
      # Line by line: a run that is stopped leaves what it has found.
      file = stack.enter_context(open(args.csv, "w", newline="", buffering=1))
      writer = csv.writer(file)
    for line in stream:
      lines.append(line)
      status.update(f"{len(lines) - 1} lines, last {line[0]}")
      if args.csv:
        writer.writerow(line)
  _print_table(console, title, lines)
  return lines


if __name__ == "__main__":
  main()
