"""Measures time and memory of attention against its length.

    python -m benchmarks.attention --csv=attention.csv --plot=attention.png

Forms that are compared, on the same random float32 inputs:

  spectral     spectral_attention of posrf-orf
  naive        the same features of all positions at once, and two einsums
               (bidirectional only: a causal one would need [T, F, V])
  hybrid       the same with exact keys: window=63, num_heavy=32 (causal:
               num_sinks=4)
  local        softmax attention to the keys of a query's block of 64 and of
               both neighbours (causal: of the one before)
  softmax      jax.nn.dot_product_attention
  exact        exact_attention of this library

Each figure comes from a process of its own; forms of the same case are timed in
turn, a call of each at a time. `first_s` is the first call with compilation,
`ms` the median of calls after it, `cpu_ms` the same in CPU time of all threads,
`temp_mib` what the compiled program plans beside its arguments and results.
Quadratic forms are left out where their weights alone would need more than
`--limit_gib`. The CSV is written as figures come; rows that it holds are not
measured again.
"""

import argparse
import itertools
import json
import time

from benchmarks.pictures import attention_panel, draw_lines
from benchmarks.processes import measure_missing, median_times

FORMS = ("spectral", "hybrid", "naive", "local", "softmax", "exact")
COLUMNS = ("form", "is_causal", "backward", "batch", "length")
FIGURES = ("ms", "cpu_ms", "temp_mib", "first_s", "device")
HEADS, HEAD_DIM, ROWS = 2, 32, 128
LENGTHS = (256, 512, 1024, 2048, 4096, 16384, 65536)


def attention_of(form: str, is_causal: bool):
  """Returns a function of query, key and value ``[B, T, N, H]``."""
  import jax
  import jax.numpy as jnp

  import spectraformer_jax as sf
  from spectraformer_jax.baselines import local_attention

  fm = sf.feature_map("posrf", "orf", num_features=ROWS)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM, num_heads=HEADS)
  if form in ("spectral", "hybrid"):
    options = {"feature_map": fm, "variables": variables}
    if form == "hybrid":
      others = {"num_sinks": 4} if is_causal else {"num_heavy": 32}
      options |= {"window": 63, **others}
    return lambda q, k, v: sf.spectral_attention(
      q, k, v, is_causal=is_causal, **options
    )
  if form == "local":
    return lambda q, k, v: local_attention(
      q, k, v, neighbours=1, is_causal=is_causal
    )
  if form == "softmax":
    return lambda q, k, v: jax.nn.dot_product_attention(
      q, k, v, is_causal=is_causal
    )
  if form == "exact":
    return lambda q, k, v: sf.exact_attention(q, k, v, is_causal=is_causal)

  def naive(query, key, value):
    def log_features(x, side):
      scaled = x * HEAD_DIM**-0.25
      return fm.log_features(variables, scaled, side=side).log_magnitude

    log_phi, log_psi = log_features(query, "query"), log_features(key, "key")
    psi = jnp.exp(log_psi - jnp.max(log_psi, axis=(1, 3), keepdims=True))
    phi = jnp.exp(log_phi - jnp.max(log_phi, axis=3, keepdims=True))
    kv = jnp.einsum("bsnf,bsnv->bnfv", psi, value)
    normalizer = jnp.einsum("btnf,bnf->btn", phi, jnp.sum(psi, axis=1))
    return jnp.einsum("btnf,bnfv->btnv", phi, kv) / normalizer[..., None]

  return naive


def measure(case: dict, repeats: int) -> dict:
  """Measures one case in this process."""
  import jax
  import jax.numpy as jnp

  shape = (3, case["batch"], case["length"], HEADS, HEAD_DIM)
  inputs = tuple(jax.random.normal(jax.random.key(1), shape))
  attention = attention_of(case["form"], case["is_causal"])
  function = attention
  if case["backward"]:
    loss = lambda *inputs: jnp.sum(jnp.sin(attention(*inputs)))
    function = jax.value_and_grad(loss, argnums=(0, 1, 2))
  jax.block_until_ready(inputs)
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*inputs).compile()
  jax.block_until_ready(compiled(*inputs))
  first = time.perf_counter() - start
  wall, cpu = median_times(
    lambda: jax.block_until_ready(compiled(*inputs)),
    repeats,
    enough_s=20.0,
    in_turn=True,
  )
  return {
    "ms": round(1e3 * wall, 3),
    "cpu_ms": round(1e3 * cpu, 3),
    "temp_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 2),
    "first_s": round(first, 2),
    "device": jax.devices()[0].device_kind,
  }


def cases(args: argparse.Namespace) -> list[dict]:
  """Returns the cases to measure, short sequences first."""
  found = []
  for length, batch, backward, is_causal, form in itertools.product(
    args.lengths, args.batches, (False, True), (False, True), args.forms
  ):
    weights = 4 * batch * HEADS * length**2 / 2**30
    quadratic = form in ("softmax", "exact")
    if quadratic and (1 + backward) * weights > args.limit_gib:
      continue
    if form == "naive" and is_causal:
      continue
    values = (form, is_causal, backward, batch, length)
    found.append(dict(zip(COLUMNS, values, strict=True)))
  return found


def print_table(rows: list[dict]) -> None:
  """Prints a line for each case, with its ratio to the softmax form."""
  from rich.console import Console
  from rich.table import Table

  table = Table("form", "mode", "pass", "B", "T", "ms", "/ softmax", "MiB")
  softmax = {
    tuple(row[name] for name in COLUMNS[1:]): row["ms"]
    for row in rows
    if row["form"] == "softmax"
  }
  for row in sorted(rows, key=lambda row: [row[c] for c in COLUMNS[1:]]):
    other = softmax.get(tuple(row[name] for name in COLUMNS[1:]))
    table.add_row(
      row["form"],
      "causal" if row["is_causal"] else "bidirectional",
      "forward + backward" if row["backward"] else "forward",
      str(row["batch"]),
      f"{row['length']:,}",
      f"{row['ms']:.1f}",
      f"{row['ms'] / other:.3f}" if other else "",
      f"{row['temp_mib']:,.1f}",
    )
  Console(width=110).print(table)


def plot(rows: list[dict], path: str) -> None:
  """Draws time and memory against length, for the smallest batch."""
  batch = min(row["batch"] for row in rows)
  figures = (("ms", "milliseconds"), ("temp_mib", "temporary memory, MiB"))
  modes = {"bidirectional": False, "causal": True}

  def panel(figure, mode):
    case = {"is_causal": modes[mode], "backward": True, "batch": batch}
    return attention_panel(rows, *figure, title=mode, **case)

  draw_lines(
    path,
    [[panel(figure, mode) for mode in modes] for figure in figures],
    title=f"Attention forward + backward: {batch} x T x {HEADS} heads of "
    f"{HEAD_DIM}, {ROWS} features, {rows[0]['device']}",
  )


def main() -> None:
  """Reads the flags and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--csv", default="attention.csv")
  parser.add_argument("--plot", help="also draw a picture")
  parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
  parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
  parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--limit_gib", type=float, default=4.0)
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    print(json.dumps(measure(json.loads(args.one), args.repeats)))
    return
  rows = measure_missing(
    "benchmarks.attention",
    args.csv,
    cases(args),
    FIGURES,
    ("--repeats", str(args.repeats)),
    compared="form",
  )
  print_table(rows)
  if args.plot:
    plot(rows, args.plot)


if __name__ == "__main__":
  main()
