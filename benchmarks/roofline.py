"""Compares the cost of each part of a training step with the least possible.

    python -m benchmarks.roofline --plot=roofline.png

Parts of the paper's model for text (8 x 4096 tokens, 2 heads of 32, 128
features, width 64), forward alone, each compiled by itself, on one core. The
limit is the larger of operations / peak and bytes / bandwidth. Both are
measured first: the peak with a product of 1024 x 1024 matrices, the bandwidth
with a copy of 256 MiB. Operations are counted by hand (a multiplication and an
addition are two, an exponential or another transcendental function counts as
ten); bytes are inputs and outputs, once. The limit over the time may be above 1
for parts whose arrays fit into the cache.
"""

import argparse

TOKENS, HEADS, HEAD_DIM, ROWS, WIDTH, MLP = 8 * 4096, 2, 32, 128, 64, 128
TRANSCENDENTAL = 10


def seconds(function, *inputs, repeats: int = 15) -> float:
  """Returns the median CPU seconds of a compiled call."""
  import jax

  from benchmarks.processes import median_times

  jitted = jax.jit(function)
  jax.block_until_ready(jitted(*inputs))
  return median_times(lambda: jax.block_until_ready(jitted(*inputs)), repeats)[
    1
  ]


def parts() -> list[tuple]:
  """Returns name, function, shapes and number of operations of each part."""
  import jax
  import jax.numpy as jnp

  import spectraformer_jax as sf
  from spectraformer_jax.nn.dropout import Dropout

  n = TOKENS * HEADS
  fm = sf.feature_map("posrf", "orf", num_features=ROWS)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM, num_heads=HEADS)

  def attention(q, k, v):
    return sf.spectral_attention(q, k, v, feature_map=fm, variables=variables)

  def adamw(p, g, m, v):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return p - 1e-4 * m / (jnp.sqrt(v) + 1e-6), m, v

  def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

  def dropout(x):
    # The key depends on x, since XLA may know the bits of a constant key.
    rngs = {"dropout": jax.random.key(x[0, 0].astype(int))}
    return Dropout(0.1).apply({}, x, deterministic=False, rngs=rngs)

  tokens, heads = (TOKENS, WIDTH), (8, TOKENS // 8, HEADS, HEAD_DIM)
  inner, features = (TOKENS, MLP), (n, ROWS)
  square, product = (WIDTH, WIDTH), jnp.matmul
  t, m = TOKENS, TRANSCENDENTAL
  return [
    (
      "query, key, value",
      product,
      (tokens, (WIDTH, 3 * WIDTH)),
      6 * t * WIDTH**2,
    ),
    ("output projection", product, (tokens, square), 2 * t * WIDTH**2),
    ("MLP, first", product, (tokens, (WIDTH, MLP)), 2 * t * WIDTH * MLP),
    ("MLP, second", product, (inner, (MLP, WIDTH)), 2 * t * WIDTH * MLP),
    ("GELU", jax.nn.gelu, (inner,), (m + 6) * t * MLP),
    ("layer norm", norm, (tokens,), 8 * t * WIDTH),
    ("dropout", dropout, (tokens,), 33 * t * WIDTH),
    (
      "W x",
      product,
      ((n, HEAD_DIM), (HEAD_DIM, ROWS)),
      2 * n * HEAD_DIM * ROWS,
    ),
    ("exp of features", jnp.exp, (features,), m * n * ROWS),
    (
      "sum of phi(k) v",
      lambda phi, v: phi.T @ v,
      (features, (n, HEAD_DIM)),
      2 * n * HEAD_DIM * ROWS,
    ),
    (
      "phi(q) times sum",
      product,
      (features, (ROWS, HEAD_DIM)),
      2 * n * HEAD_DIM * ROWS,
    ),
    (
      "attention, fused",
      attention,
      (heads,) * 3,
      n * (8 * HEAD_DIM * ROWS + 2 * m * ROWS),
    ),
    ("AdamW, 400k parameters", adamw, ((400_000,),) * 4, 16 * 400_000),
  ]


def measure() -> tuple[float, float, list[tuple]]:
  """Returns peak and bandwidth, both per second, and the rows of the table."""
  import jax
  import jax.numpy as jnp

  def normal(shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)

  big = normal((1024, 1024))
  peak = 2 * 1024**3 / seconds(jnp.matmul, big, big)
  long = jnp.zeros(2**26)
  bandwidth = 2 * long.nbytes / seconds(jnp.negative, long)
  rows = []
  for name, function, shapes, operations in parts():
    inputs = [normal(shape) for shape in shapes]
    outputs = jax.tree.leaves(jax.eval_shape(function, *inputs))
    moved = sum(x.nbytes for x in inputs)
    moved += sum(x.size * x.dtype.itemsize for x in outputs)
    limit = max(operations / peak, moved / bandwidth)
    by = "operations" if operations / peak > moved / bandwidth else "bytes"
    rows.append(
      (name, operations, moved, limit, by, seconds(function, *inputs))
    )
  return peak, bandwidth, rows


def main() -> None:
  """Prints the table, and draws it for --plot."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--plot", help="also draw a picture")
  args = parser.parse_args()
  from rich.console import Console
  from rich.table import Table

  from benchmarks.processes import use_cores
  from spectraformer_jax.train.devices.host_memory import keep_freed_memory

  use_cores(1)
  keep_freed_memory()
  peak, bandwidth, rows = measure()
  table = Table(
    "part",
    "Mop",
    "MiB",
    "limit ms",
    "by",
    "CPU ms",
    "limit / time",
    title=f"{peak / 1e9:.0f} Gop/s, {bandwidth / 2**30:.1f} GiB/s",
  )
  for name, operations, moved, limit, by, spent in rows:
    table.add_row(
      name,
      f"{operations / 1e6:,.0f}",
      f"{moved / 2**20:,.0f}",
      f"{1e3 * limit:.2f}",
      by,
      f"{1e3 * spent:.2f}",
      f"{limit / spent:.2f}",
    )
  Console(width=100).print(table)
  if args.plot:
    from benchmarks.pictures import draw_bars

    bars = {row[0]: (1e3 * row[3], 1e3 * row[5]) for row in rows}
    draw_bars(args.plot, bars, "CPU milliseconds", ("limit", "measured"))


if __name__ == "__main__":
  main()
