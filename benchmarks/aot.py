"""Compiles attention and training steps for accelerators, without having them.

    pip install ".[tpu]" && python -m benchmarks.aot --targets v5e v6e
    pip install ".[cuda]" && python -m benchmarks.aot --targets h100

For one chip of v5e, v6e and H100: attention of bfloat16 query, key and value
(posrf-orf, two heads of 32, 128 features) and training steps of the paper's
model, T = 4096, 65536 and 2^20. Target `pods`: the step on slices of v5e. Each
case is compiled in a process of its own and becomes a row of --csv; cases that
have a row are not compiled again. Nothing is run: times are estimates.

  arguments, results, temporary, peak   the plan of the device's memory, MiB
  cycles, ms            the compiler's estimate for TPUs; the body of a loop
                        counts once for each iteration
  traffic               MiB to and from memory, by the compiled text
  least                 MiB of query, key, value, output and their gradients,
                        once each
  least_ms              time to move `least` at the chip's bandwidth
  all_reduces, others   collectives in the program
  compile_s             seconds of tracing and compilation
"""

import argparse
import csv
import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

CSV = pathlib.Path(__file__).parent / "aot.csv"

HEADS, HEAD_DIM, NUM_FEATURES = 2, 32, 128
ROWS_OF_A_CHIP = 2  # sequences on each chip of a slice

# Cycles a second and bytes a second of one chip. The clock is the peak over the
# operations in a cycle: v5e does 197 TFLOP/s in 4 units of 128 x 128
# multiplications and additions, v6e 918 TFLOP/s in 4 units of 256 x 256.
CLOCK = {"v5e": 1.5e9, "v6e": 1.75e9}
BANDWIDTH = {"v5e": 819e9, "v6e": 1640e9, "h100": 3350e9}


class Case(NamedTuple):
  """One program.

  Attributes:
    target: "v5e", "v6e", "h100", or a slice such as "v5e:4x4".
    program: "causal", "bidirectional" or "naive" (bidirectional, all features
      at once) attention; "causal-exact" or "bidirectional-exact", the same with
      exact keys (window=63, and num_sinks=4 or num_heavy=32); or a training
      step, "step-jit" or "step-pmap", by the engine that maps it over devices.
    direction: "forward" or "both" (forward and backward).
    batch: B, over all devices.
    length: T.
  """

  target: str
  program: str
  direction: str
  batch: int
  length: int

  @property
  def name(self) -> str:
    """The name that identifies a row."""
    return "/".join(map(str, self))


class CompiledCase(NamedTuple):
  """The figures of one case, as the module describes them; sizes in MiB."""

  case: str
  arguments: float | None = None
  results: float | None = None
  temporary: float | None = None
  peak: float | None = None
  cycles: int | None = None
  ms: float | None = None
  traffic: float | None = None
  least: float | None = None
  least_ms: float | None = None
  all_reduces: int | None = None
  others: int | None = None
  compile_s: float | None = None
  versions: str | None = None
  error: str | None = None


def cases() -> list[Case]:
  """Returns all cases, in the order of the table."""
  sizes = ((8, 2**12), (8, 2**16), (1, 2**20))
  found = []
  for target in ("v5e", "v6e", "h100"):
    for batch, length in sizes:
      for program in ("causal", "bidirectional"):
        for direction in ("forward", "both"):
          found.append(Case(target, program, direction, batch, length))
      if length <= 2**16:
        programs = ["naive"]
        if target != "v6e":
          programs += ["causal-exact", "bidirectional-exact"]
        for program in programs:
          found.append(Case(target, program, "both", batch, length))
      rows = batch if length == 2**12 else 1
      found.append(Case(target, "step-jit", "both", rows, length))
  for topology, chips in (("v5e:4x4", 16), ("v5e:16x16", 256)):
    for engine in ("jit", "pmap"):
      batch = chips * ROWS_OF_A_CHIP
      found.append(Case(topology, f"step-{engine}", "both", batch, 2**12))
  return found


def compile_case(case: Case) -> CompiledCase:
  """Compiles one case, in this process."""
  from benchmarks import hlo_cost
  from spectraformer_jax.linear_attention import for_platform

  chip = case.target.split(":")[0]
  platform = "gpu" if chip == "h100" else "tpu"
  start = time.perf_counter()
  with for_platform(platform):
    if case.program.startswith("step"):
      compiled = _compile_step(case)
    else:
      compiled = _compile_attention(case)
  seconds = time.perf_counter() - start
  plan, cost = compiled.memory_analysis(), hlo_cost.cost_of(compiled.as_text())
  least = None
  if not case.program.startswith("step"):
    arrays = {"forward": 4, "both": 8}[case.direction]
    # Two bytes for each bfloat16 number.
    least = 2 * arrays * case.batch * case.length * HEADS * HEAD_DIM
  is_tpu = platform == "tpu"
  return CompiledCase(
    case=case.name,
    arguments=_mib(plan.argument_size_in_bytes),
    results=_mib(plan.output_size_in_bytes),
    temporary=_mib(plan.temp_size_in_bytes),
    peak=_mib(plan.peak_memory_in_bytes),
    cycles=cost.cycles if is_tpu and not cost.unknown else None,
    ms=round(1e3 * cost.cycles / CLOCK[chip], 3) if is_tpu else None,
    traffic=_mib(cost.traffic),
    least=least and _mib(least),
    least_ms=least and round(1e3 * least / BANDWIDTH[chip], 3),
    all_reduces=cost.all_reduces,
    others=cost.other_collectives,
    compile_s=round(seconds, 1),
    versions=versions(platform),
    error="cycles of an operation are unknown" if cost.unknown else None,
  )


def versions(platform: str) -> str:
  """Returns names and versions of the packages that a row depends on."""
  compiler = "libtpu" if platform == "tpu" else "jax-cuda13-plugin"
  return " ".join(
    f"{name}-{importlib.metadata.version(name)}" for name in ("jax", compiler)
  )


def _mib(count: int) -> float:
  return round(count / 2**20, 2)


def _compile_attention(case: Case):
  """Compiles attention alone."""
  import jax
  import jax.numpy as jnp

  import spectraformer_jax as sf

  fm = sf.feature_map("posrf", "orf", num_features=NUM_FEATURES)
  variables = jax.eval_shape(
    lambda rng: fm.init(rng, head_dim=HEAD_DIM, num_heads=HEADS),
    jax.random.key(0),
  )
  shape = case.batch, case.length, HEADS, HEAD_DIM
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

  def naive(query, key, value, variables):
    scale = HEAD_DIM**-0.25
    apply = functools.partial(fm.apply, variables)
    phi = apply(query.astype(jnp.float32) * scale, side="query")
    psi = apply(key.astype(jnp.float32) * scale, side="key")
    sums = jnp.einsum("bsnf,bsnv->bnfv", psi, value.astype(jnp.float32))
    numerator = jnp.einsum("btnf,bnfv->btnv", phi, sums)
    normalizer = jnp.einsum("btnf,bnf->btn", phi, jnp.sum(psi, axis=1))
    return (numerator / normalizer[..., None]).astype(value.dtype)

  def attend(query, key, value, variables):
    if case.program == "naive":
      return naive(query, key, value, variables)
    exact = {
      "causal-exact": {"window": 63, "num_sinks": 4},
      "bidirectional-exact": {"window": 63, "num_heavy": 32},
    }
    return sf.spectral_attention(
      query,
      key,
      value,
      feature_map=fm,
      variables=variables,
      is_causal=case.program.startswith("causal"),
      **exact.get(case.program, {}),
    )

  def both(query, key, value, d_out, variables):
    out, pull = jax.vjp(
      lambda *arrays: attend(*arrays, variables), query, key, value
    )
    return out, pull(d_out)

  function, arrays = {"forward": (attend, 3), "both": (both, 4)}[case.direction]
  arguments = (*[x] * arrays, variables)
  place = _placer(devices_of(case.target)[:1])
  return jax.jit(function).lower(*place(arguments)).compile()


def _compile_step(case: Case):
  """Compiles the training step of the paper's model."""
  import jax
  import jax.numpy as jnp

  import spectraformer_jax as sf
  from configs import common
  from spectraformer_jax.nn.from_config import make_feature_map
  from spectraformer_jax.train.devices import parallel
  from spectraformer_jax.train.step import optim, state, steps

  devices = devices_of(case.target)
  if ":" not in case.target:
    devices = devices[:1]
  config = common.base("text")
  fm = make_feature_map(config)
  model = sf.nn.Classifier(
    vocab_size=257,
    num_classes=2,
    max_len=case.length,
    feature_map=fm,
    dropout_rate=config.model.dropout_rate,
  )
  tx = optim.make_optimizer(config.optim, config.train.num_steps)
  keys = state.run_keys(0)
  train_state = state.create(model, fm, tx, keys)
  step = functools.partial(steps.train_step, apply_fn=model.apply, tx=tx)
  engine = case.program.removeprefix("step-")
  step = parallel.map_step(
    step, 3, engine=engine, devices=devices, donate_state=True
  )
  lead = (case.batch,)
  if engine == "pmap":
    lead = len(devices), case.batch // len(devices)
  batch = {
    "tokens": jax.ShapeDtypeStruct((*lead, case.length), jnp.uint16),
    "length": jax.ShapeDtypeStruct(lead, jnp.int32),
    "label": jax.ShapeDtypeStruct(lead, jnp.int32),
    "weight": jax.ShapeDtypeStruct(lead, jnp.float32),
  }
  place = _placer(devices)
  return step.lower(
    place(train_state), place(batch, parallel.AXIS), place(keys.dropout_rng)
  ).compile()


def devices_of(target: str) -> list:
  """Returns all devices of a slice; one device if `target` names a chip."""
  from jax.experimental import topologies

  from benchmarks import compile_kernels

  if ":" not in target:
    return [compile_kernels.device_of(target)]
  topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
  return list(topology.devices)


def _placer(devices: list):
  """Returns a function that gives the shapes of a tree a place on all devices.

  Each device holds the arrays whole, or a part of their first axis.
  """
  import jax
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.array(devices), ("data",))

  def place(tree, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
    )

  return place


def compile_elsewhere(case: Case) -> CompiledCase:
  """Compiles one case in a process of its own; a failure gives a row, too."""
  env = os.environ | {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  }
  child = subprocess.run(
    [sys.executable, "-m", "benchmarks.aot", "--one", case.name],
    capture_output=True,
    text=True,
    env=env,
    cwd=pathlib.Path(__file__).parents[1],
  )
  if child.returncode:
    lines = child.stderr.strip().splitlines() or ["no message"]
    errors = [line for line in lines if "Error" in line or "EXHAUSTED" in line]
    return CompiledCase(case.name, error=(errors or lines)[-1][:200])
  return CompiledCase(**json.loads(child.stdout.splitlines()[-1]))


def read_rows(path: pathlib.Path) -> dict[str, CompiledCase]:
  """Reads name of a case -> row; no rows if the file does not exist."""
  if not path.exists():
    return {}
  text = ("case", "versions", "error")
  with path.open(newline="") as file:
    rows = [
      CompiledCase(
        **{
          name: (cell if name in text else float(cell)) if cell else None
          for name, cell in line.items()
        }
      )
      for line in csv.DictReader(file)
    ]
  return {row.case: row for row in rows}


def write_rows(path: pathlib.Path, rows: dict[str, CompiledCase]) -> None:
  """Writes all rows, in the order of `cases`."""
  with path.open("w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CompiledCase._fields)
    for case in cases():
      if case.name in rows:
        row = rows[case.name]
        writer.writerow("" if cell is None else cell for cell in row)


def print_table(rows: Sequence[CompiledCase]) -> None:
  """Prints the most important columns."""
  from rich.console import Console
  from rich.table import Table

  shown = ("peak", "temporary", "ms", "least_ms", "traffic", "least")
  table = Table("case", *shown, "all-reduces", "compile s", "error")
  figure = lambda cell: "" if cell is None else f"{cell:,.5g}"
  for row in rows:
    table.add_row(
      row.case,
      *(figure(getattr(row, name)) for name in shown),
      figure(row.all_reduces),
      figure(row.compile_s),
      row.error,
    )
  Console(width=150).print(table)


def plot(rows: dict[str, CompiledCase], path: str) -> None:
  """Draws estimated time and planned memory against the tokens of a program."""
  from benchmarks.pictures import Panel, draw_lines

  targets = ("v5e", "v6e", "h100")
  programs = {
    "causal": "causal attention",
    "bidirectional": "bidirectional attention",
    "step-jit": "training step",
  }
  least = "arrays once, v5e"

  def panel(program, figure, label):
    lines = {name: [] for name in (*targets, least)}
    for case in cases():
      row = rows.get(case.name)
      if row is None or (case.program, case.direction) != (program, "both"):
        continue
      tokens = case.batch * case.length
      if case.target in targets and getattr(row, figure) is not None:
        lines[case.target].append((tokens, getattr(row, figure)))
      once = row.least_ms if figure == "ms" else row.least
      if case.target == "v5e" and once is not None:
        lines[least].append((tokens, once))
    return Panel(lines, "tokens B T", label, programs[program])

  figures = (("ms", "milliseconds, estimated"), ("peak", "MiB at the peak"))
  draw_lines(
    path,
    [[panel(program, *f) for program in programs] for f in figures],
    title="Forward + backward, compiled, not run",
    size=(12, 7),
  )


def main(argv: Sequence[str] | None = None) -> list[CompiledCase]:
  """Compiles missing cases, writes and prints the rows, and returns them."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  targets = ("v5e", "v6e", "h100", "pods")
  parser.add_argument("--targets", nargs="+", choices=targets, default=targets)
  parser.add_argument("--contains", default="", help="in the names of cases")
  parser.add_argument("--csv", type=pathlib.Path, default=CSV)
  parser.add_argument(
    "--again", action="store_true", help="compile what has a row already"
  )
  parser.add_argument("--plot", help="also draw a picture of all rows")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.one:
    case = next(case for case in cases() if case.name == args.one)
    print(json.dumps(compile_case(case)._asdict()))
    return []
  chosen = [
    case
    for case in cases()
    if ("pods" if ":" in case.target else case.target) in args.targets
    and args.contains in case.name
  ]
  rows = read_rows(args.csv)
  for case in chosen:
    if args.again or case.name not in rows or rows[case.name].error:
      rows[case.name] = compile_elsewhere(case)
      write_rows(args.csv, rows)
  if args.plot:
    plot(rows, args.plot)
  rows = [rows[case.name] for case in chosen]
  print_table(rows)
  return rows


if __name__ == "__main__":
  main()
