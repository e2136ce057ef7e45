"""Measures the cost of attention and of a training step as one size grows.

    python -m benchmarks.scaling --csv=scaling.csv --plot=scaling.png

Around 2 x 2048 tokens, 2 heads of 32, 128 features, 2 layers: the length T, the
features M, the head dimension H, the heads N and the depth are each varied
alone. Attention is posrf-orf, forward + backward, `bidirectional` and `causal`;
`step` is a training step of the paper's model. Figures are medians of CPU time
of all threads. The exponent is the slope of log time against log size: 1 is
linear. Each figure comes from a process of its own, and the sizes of a line
take turns, a call of each at a time; rows that the CSV holds are not measured
again.
"""

import argparse
import json

from benchmarks import processes

BASE = {"T": 2048, "M": 128, "H": 32, "N": 2, "depth": 2}
SIZES = {
  "T": (512, 1024, 2048, 4096, 8192, 16384),
  "M": (32, 64, 128, 256, 512),
  "H": (16, 32, 64, 128),
  "N": (1, 2, 4, 8),
  "depth": (1, 2, 4, 8),
}
FORMS = ("bidirectional", "causal", "step")
BATCH = 2


def attention(sizes: dict, is_causal: bool):
  """Returns a jitted gradient of attention, and its inputs."""
  import jax
  import jax.numpy as jnp

  import spectraformer_jax as sf

  fm = sf.feature_map("posrf", "orf", num_features=sizes["M"])
  variables = fm.init(
    jax.random.key(0), head_dim=sizes["H"], num_heads=sizes["N"]
  )
  shape = (3, BATCH, sizes["T"], sizes["N"], sizes["H"])
  inputs = 0.5 * jax.random.normal(jax.random.key(1), shape)

  def loss(inputs):
    out = sf.spectral_attention(
      *inputs, feature_map=fm, variables=variables, is_causal=is_causal
    )
    return jnp.sum(jnp.sin(out))

  return jax.jit(jax.grad(loss)), (inputs,)


def training_step(sizes: dict):
  """Returns a function that takes the next training step, and no inputs: ()."""
  import numpy as np

  import spectraformer_jax as sf
  from benchmarks.train_step import first_step

  fm = sf.feature_map("posrf", "orf", num_features=sizes["M"])
  model = sf.nn.Classifier(
    max_len=sizes["T"],
    vocab_size=257,
    num_classes=2,
    num_layers=sizes["depth"],
    num_heads=sizes["N"],
    head_dim=sizes["H"],
    feature_map=fm,
  )
  step, train_state, rng = first_step(model, fm)
  batch = {
    "tokens": np.ones((BATCH, sizes["T"]), np.uint16),
    "length": np.full(BATCH, sizes["T"], np.int32),
    "label": np.zeros(BATCH, np.int32),
    "weight": np.ones(BATCH, np.float32),
  }

  def call():
    nonlocal train_state
    train_state, _ = step(train_state, batch, rng)
    return train_state

  return call, ()


def measure(case: dict, repeats: int) -> dict:
  """Measures CPU milliseconds of one case in this process."""
  import jax

  sizes = BASE | {case["axis"]: case["size"]}
  if case["form"] == "step":
    function, inputs = training_step(sizes)
  else:
    function, inputs = attention(sizes, case["form"] == "causal")
  jax.block_until_ready(function(*inputs))
  _, cpu = processes.median_times(
    lambda: jax.block_until_ready(function(*inputs)),
    repeats,
    in_turn=True,
    settle_s=0.1,
  )
  return {"cpu_ms": round(1e3 * cpu, 3)}


def lines(rows: list[dict]) -> dict[tuple[str, str], list[tuple[int, float]]]:
  """Groups rows: (axis, form) -> sizes and times; attention has no depth."""
  return {
    (axis, form): sorted(
      (row["size"], row["cpu_ms"])
      for row in rows
      if (row["axis"], row["form"]) == (axis, form)
    )
    for axis in SIZES
    for form in FORMS
    if (axis, form) not in (("depth", "bidirectional"), ("depth", "causal"))
  }


def exponent(points: list[tuple[int, float]]) -> float:
  """Slope of the logarithms over the upper half of the sizes."""
  import numpy as np

  upper = np.log(points[len(points) // 2 - 1 :])
  return float(np.polyfit(upper[:, 0], upper[:, 1], 1)[0])


def plot(found: dict, path: str) -> None:
  """Draws a panel for each axis."""
  from benchmarks.pictures import Panel, draw_lines

  def panel(axis):
    points = {form: found.get((axis, form), ()) for form in FORMS}
    notes = {
      form: f", exponent {exponent(points):.2f}"
      for form, points in points.items()
      if points
    }
    return Panel(points, axis, "CPU milliseconds", notes=notes)

  draw_lines(path, [[panel(axis) for axis in SIZES]], size=(18, 3.6))


def main() -> None:
  """Reads the flags and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--csv", default="scaling.csv")
  parser.add_argument("--plot", help="also draw a picture")
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    print(json.dumps(measure(json.loads(args.one), args.repeats)))
    return
  cases = [
    {"axis": axis, "size": size, "form": form}
    for axis, form in lines([])
    for size in SIZES[axis]
  ]
  rows = processes.measure_missing(
    "benchmarks.scaling",
    args.csv,
    cases,
    ("cpu_ms",),
    ("--repeats", str(args.repeats)),
    compared="size",
  )
  from rich.console import Console
  from rich.table import Table

  table = Table("size", "form", "CPU ms", "exponent")
  found = lines(rows)
  for (axis, form), points in found.items():
    times = ", ".join(f"{size}: {time:.1f}" for size, time in points)
    table.add_row(axis, form, times, f"{exponent(points):.2f}")
  Console(width=110).print(table)
  if args.plot:
    plot(found, args.plot)


if __name__ == "__main__":
  main()
