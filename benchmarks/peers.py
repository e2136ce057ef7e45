"""Measures this library's attention and training step beside those of others.

    pip install torch performer-pytorch
    python -m benchmarks.peers --csv=peers.csv

Forms of attention: `spectral` (spectral_attention, posrf-orf, this library),
`jax_softmax` (jax.nn.dot_product_attention), `torch_softmax`
(scaled_dot_product_attention) and `performer` (performer-pytorch's FAVOR+).
Flags add forms from checkouts of yours; this repository has none of their code:

    --spectraformer=DIR  the official release (its src folder): posrf with orf,
                         as `official`, and its training step
    --favor=FILE         Google's fast_attention.py (needs gin-config), `favor`
    --fla=DIR            flash-linear-attention, `fla`: its causal sum in plain
                         torch, with the features of FAVOR+

Each figure comes from a process of its own, on `threads` cores; forms of the
same case are timed in turn, a call of each at a time.
`first_s` is the first call (with compilation), `ms` the median of calls after
it, `cpu_ms` the same in CPU time of all threads, `mib` the most memory that the
timed calls held above what was there before them (Linux). All inputs are
random, float32. `--steps` measures whole training steps of the paper's model
instead (8 texts of 4096 tokens, 32 lists of 2048). `--keep_freed` has the C
library keep freed blocks, for every form alike, as this library's train.py
does; without it large blocks go back to the kernel after each use.
"""

import argparse
import ctypes
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import processes, train_step

FIGURES = ("ms", "cpu_ms", "mib", "first_s", "version")
LENGTHS = (256, 512, 1024, 4096, 16384, 65536)
HEADS, HEAD_DIM, ROWS = 2, 32, 128
OURS = ("spectral", "jax_softmax")
QUADRATIC = ("jax_softmax", "torch_softmax")
# A file that must be in the folder that a flag names; "" if it names a file.
CHECKOUTS = {
  "spectraformer": "models/model_LRA.py",
  "favor": "",
  "fla": "fla/ops/linear_attn/naive.py",
}


def peak_mib() -> float:
  """Peak memory in MiB since `forget_peak`."""
  return _status("VmHWM")


def forget_peak() -> float:
  """Gives back freed memory, resets the peak and returns the memory in use."""
  ctypes.CDLL(None).malloc_trim(0)
  Path("/proc/self/clear_refs").write_text("5")
  return _status("VmRSS")


def _status(name: str) -> float:
  """Reads a line of /proc/self/status, in MiB."""
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith(name):
      return int(line.split()[1]) / 1024
  raise ValueError(f"/proc/self/status has no {name}.")


def ours(form: str, case: dict) -> Callable[[], None]:
  """Returns a call of a form in JAX; the call waits for its results."""
  import jax
  import jax.numpy as jnp

  from benchmarks.attention import attention_of

  name = {"spectral": "spectral", "jax_softmax": "softmax"}[form]
  attention = attention_of(name, case["is_causal"])
  shape = (3, case["batch"], case["length"], HEADS, HEAD_DIM)
  return _jitted(jax, jnp, attention, shape, case["backward"])


def _jitted(jax, jnp, attention, shape, backward) -> Callable[[], None]:
  """Returns a call of the form, which compiles when it is first made."""
  inputs = tuple(jax.random.normal(jax.random.key(1), shape))
  function = attention
  if backward:
    loss = lambda *inputs: jnp.sum(jnp.sin(attention(*inputs)))
    function = jax.value_and_grad(loss, argnums=(0, 1, 2))
  jitted = jax.jit(function)
  return lambda: jax.block_until_ready(jitted(*inputs))


def favor(case: dict, file: str) -> Callable[[], None]:
  """Returns a call of Google's FAVOR+, with features drawn once."""
  import jax
  import jax.numpy as jnp

  module = _load("fast_attention", Path(file))
  attention = module.make_fast_softmax_attention(
    HEAD_DIM,
    nb_features=ROWS,
    redraw_features=False,
    unidirectional=case["is_causal"],
  )
  shape = (3, case["batch"], case["length"], HEADS, HEAD_DIM)
  return _jitted(jax, jnp, attention, shape, case["backward"])


def in_torch(form: str, case: dict, paths: dict) -> Callable[[], None]:
  """Returns a call of a form in torch, on inputs ``[B, N, T, H]``."""
  import torch

  torch.manual_seed(0)
  torch.set_num_threads(case["threads"])
  attention = torch_attention(form, case["is_causal"], paths)
  shape = (case["batch"], HEADS, case["length"], HEAD_DIM)
  inputs = [
    torch.randn(shape, requires_grad=case["backward"]) for _ in range(3)
  ]

  def call():
    if not case["backward"]:
      with torch.no_grad():
        attention(*inputs)
      return
    for x in inputs:
      x.grad = None
    attention(*inputs).sin().sum().backward()

  return call


def torch_attention(form: str, is_causal: bool, paths: dict) -> Callable:
  """Returns a function of query, key and value ``[B, N, T, H]``."""
  import torch

  if form == "torch_softmax":
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
      q, k, v, is_causal=is_causal
    )
  if form == "official":
    _official(paths["spectraformer"])
    from models.attention_performer import PerformerAttention

    config = {"head_dim": HEAD_DIM, "rp_dim": ROWS}
    config |= {"kernel_type": "posrf", "feat": "orf"}
    attention = PerformerAttention(config)
    return lambda q, k, v: attention(
      q, k, v, q.new_ones(q.shape[0], q.shape[2])
    )
  from performer_pytorch import performer_pytorch as performer

  attention = performer.FastAttention(HEAD_DIM, ROWS, causal=is_causal)
  if form == "performer":
    return attention
  root = Path(paths["fla"]) / "fla" / "ops" / "linear_attn"
  causal_sum = _load("naive", root / "naive.py").naive_chunk_linear_attn
  rows = attention.projection_matrix

  def fla(query, key, value):
    phi, psi = (
      performer.softmax_kernel(
        x, projection_matrix=rows, is_query=is_query, device=x.device
      ).transpose(1, 2)
      for x, is_query in ((query, True), (key, False))
    )
    return causal_sum(phi, psi, value.transpose(1, 2), normalize=True)

  return fla


def official_step(case: dict, path: str) -> Callable[[], None]:
  """Returns a step of the release's model: AdamW, gradient values clipped."""
  import torch

  _official(path)
  from models.model_LRA import ModelForSC

  torch.manual_seed(0)
  torch.set_num_threads(case["threads"])
  shape = train_step.SHAPES[case["task"]]
  batch, length = shape["batch"], shape["length"]
  component, matrix = case["pair"].split("-")
  sizes = {"embedding_dim": 64, "transformer_dim": 64, "head_dim": HEAD_DIM}
  model = ModelForSC(
    sizes
    | {"transformer_hidden_dim": 128, "num_head": HEADS, "num_layers": 2}
    | {
      "vocab_size": 512,
      "max_seq_len": length,
      "num_classes": shape["num_classes"],
    }
    | {"dropout_prob": 0.1, "attention_dropout": 0.1, "pooling_mode": "MEAN"}
    | {"learn_pos_emb": True, "tied_weights": False, "mixed_precision": False}
    | {"attn_type": "performer", "rp_dim": ROWS, "batch_size": batch}
    | {"kernel_type": component, "feat": matrix, "max_length": length}
  )
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6)
  tokens = torch.randint(
    1, 257 if case["task"] == "text" else 16, (batch, length)
  )
  mask, label = torch.ones(batch, length), torch.zeros(batch, dtype=torch.long)

  def step():
    optimizer.zero_grad()
    model(tokens, mask, label)["loss"].mean().backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()

  return step


def _official(path: str) -> None:
  """Makes the release's modules importable."""
  import torch

  # The release is no package: its modules import each other by their names.
  sys.path.insert(0, str(Path(path).resolve()))
  # The release was written for a torch that had torch.qr.
  torch.qr = lambda a, some: torch.linalg.qr(a, mode="reduced")


def _load(name: str, path: Path):
  """Imports a module from its file."""
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def call_of(case: dict, paths: dict) -> tuple[Callable[[], None], str]:
  """Returns the call to time, and the version of its framework."""
  form = case["form"]
  if "task" in case and form == "spectral":
    call = train_step.make_call(case["task"], case["pair"])
  elif "task" in case:
    call = official_step(case, paths["spectraformer"])
  elif form in OURS:
    call = ours(form, case)
  elif form == "favor":
    call = favor(case, paths["favor"])
  else:
    call = in_torch(form, case, paths)
  library = sys.modules["torch" if "torch" in sys.modules else "jax"]
  return call, f"{library.__name__} {library.__version__}"


def measure(case: dict, repeats: int, paths: dict) -> dict:
  """Measures one case in this process."""
  processes.use_cores(case["threads"])
  if case["keep_freed"]:
    from spectraformer_jax.train.devices.host_memory import keep_freed_memory

    keep_freed_memory()
  call, version = call_of(case, paths)
  start = time.perf_counter()
  call()
  first = time.perf_counter() - start
  before = forget_peak()
  wall, cpu = processes.median_times(call, repeats, enough_s=10.0, in_turn=True)
  return {
    "ms": round(1e3 * wall, 3),
    "cpu_ms": round(1e3 * cpu, 3),
    "mib": round(max(peak_mib() - before, 0.0), 1),
    "first_s": round(first, 2),
    "version": version,
  }


def cases(args: argparse.Namespace, paths: dict) -> list[dict]:
  """Returns the cases to measure, short sequences first."""
  common = {"threads": args.threads, "keep_freed": args.keep_freed}
  if args.steps:
    forms = ["spectral"] + ["official"] * bool(paths["spectraformer"])
    return [
      {"form": form, "task": task, "pair": pair} | common
      for task, pair, form in itertools.product(
        args.tasks, ("posrf-orf", "oprf-orf"), forms
      )
    ]
  forms = [*OURS, "torch_softmax", "performer"]
  given = {"official": "spectraformer", "favor": "favor", "fla": "fla"}
  forms += [form for form, flag in given.items() if paths[flag]]
  found = []
  for length, batch, backward, is_causal, form in itertools.product(
    args.lengths, args.batches, (False, True), (False, True), forms
  ):
    # The official release has no causal form, fla only a causal one.
    if form in ("official", "fla") and is_causal != (form == "fla"):
      continue
    limit = args.longest_quadratic
    # Causal performer-pytorch without a GPU keeps an array [T, F, H].
    slow = form in QUADRATIC or (form == "performer" and is_causal)
    if slow and batch * length > limit:
      continue
    found.append(
      {"form": form, "is_causal": is_causal, "backward": backward}
      | {"batch": batch, "length": length}
      | common
    )
  return found


def print_table(rows: list[dict]) -> None:
  """Prints a line for each case, with its CPU time over that of `spectral`."""
  from rich.console import Console
  from rich.table import Table

  def what(row):
    if "task" in row:
      return (row["task"], row["pair"])
    passes = "forward + backward" if row["backward"] else "forward"
    mode = "causal" if row["is_causal"] else "bidirectional"
    return (mode, passes, f"{row['batch']} x {row['length']:,}")

  table = Table("what", "form", "thr.", "kept", "ms", "CPU ms", "/ ours", "MiB")
  key = lambda row: (*what(row), row["threads"], row["keep_freed"])
  base = {key(r): r["cpu_ms"] for r in rows if r["form"] == "spectral"}
  for row in sorted(rows, key=key):
    other = base.get(key(row))
    table.add_row(
      ", ".join(what(row)),
      row["form"],
      str(row["threads"]),
      "yes" if row["keep_freed"] else "no",
      f"{row['ms']:,.1f}",
      f"{row['cpu_ms']:,.1f}",
      f"{row['cpu_ms'] / other:.2f}" if other else "",
      f"{row['mib']:,.0f}",
    )
  Console(width=120).print(table)


def plot(rows: list[dict], path: str) -> None:
  """Draws CPU time of attention against length, for the smallest batch."""
  from benchmarks.pictures import attention_panel, draw_lines

  batch = min(row["batch"] for row in rows)
  modes = {"bidirectional": False, "causal": True}
  passes = {"forward": False, "forward + backward": True}

  def panel(direction, mode):
    case = {"is_causal": modes[mode], "backward": passes[direction]}
    title = f"{mode}, {direction}"
    return attention_panel(
      rows, "cpu_ms", "CPU milliseconds", title=title, batch=batch, **case
    )

  draw_lines(
    path,
    [[panel(direction, mode) for mode in modes] for direction in passes],
    title=f"Attention: {batch} x T x {HEADS} heads of {HEAD_DIM}, {ROWS} "
    f"features, cores: {rows[0]['threads']}",
  )


def main() -> None:
  """Reads the flags and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--csv", default="peers.csv")
  parser.add_argument("--plot", help="also draw a picture of attention")
  parser.add_argument("--steps", action="store_true")
  parser.add_argument(
    "--tasks", nargs="+", default=train_step.SHAPES, choices=train_step.SHAPES
  )
  parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
  parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
  parser.add_argument("--threads", type=int, default=1)
  parser.add_argument("--keep_freed", action="store_true")
  parser.add_argument("--repeats", type=int, default=10)
  parser.add_argument("--longest_quadratic", type=int, default=16384)
  for name in CHECKOUTS:
    parser.add_argument(f"--{name}")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.plot and args.steps:
    parser.error("--plot draws attention, --steps measures training steps.")
  paths = {name: getattr(args, name) for name in CHECKOUTS}
  for name, path in paths.items():
    if path and not (Path(path) / CHECKOUTS[name]).is_file():
      parser.error(
        f"--{name}={path}: no {CHECKOUTS[name] or 'such file'} there."
      )
  if args.one:
    print(json.dumps(measure(json.loads(args.one), args.repeats, paths)))
    return
  given = [f"--{name}={path}" for name, path in paths.items() if path]
  rows = processes.measure_missing(
    "benchmarks.peers",
    args.csv,
    cases(args, paths),
    FIGURES,
    (*given, "--repeats", str(args.repeats)),
    compared="form",
  )
  print_table(rows)
  if args.plot:
    chosen = {"threads": args.threads, "keep_freed": args.keep_freed}
    plot([row for row in rows if chosen.items() <= row.items()], args.plot)


if __name__ == "__main__":
  main()
