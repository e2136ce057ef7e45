"""Compiles attention over one long sequence for a TPU that is not there.

    pip install ".[tpu]" && python -m benchmarks.long_sequence

Sequence-parallel attention, causal and not, forward and backward, of bfloat16
query, key and value of 2^20 tokens, compiled ahead of time for a v5e slice of 8
chips (16 GB each). Prints the memory plan of each chip and the traffic between
chips; a program that does not fit is refused by the compiler. Nothing is run.
"""

import argparse
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import spectraformer_jax as sf
from spectraformer_jax.linear_attention import for_platform

COLLECTIVE = re.compile(
  r"= \(?(\w+)\[([\d,]*)\]\S* "
  r"(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)"
)
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}


def compile_one(mesh: Mesh, args: argparse.Namespace, is_causal: bool):
  """Compiles the gradient; returns it and the seconds of compilation."""
  fm = sf.feature_map("posrf", "orf", num_features=args.num_features)
  sizes = {"head_dim": args.head_dim, "num_heads": args.num_heads}
  whole = NamedSharding(mesh, P())
  variables = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    jax.eval_shape(lambda: fm.init(jax.random.key(0), **sizes)),
  )
  x = jax.ShapeDtypeStruct(
    (1, args.length, args.num_heads, args.head_dim),
    jnp.bfloat16,
    sharding=NamedSharding(mesh, P(None, "sequence")),
  )

  def loss(query, key, value, variables):
    out = sf.sequence_parallel_attention(
      query,
      key,
      value,
      mesh=mesh,
      axis="sequence",
      feature_map=fm,
      variables=variables,
      is_causal=is_causal,
    )
    return jnp.sum(out.astype(jnp.float32) ** 2)

  start = time.perf_counter()
  gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
  with for_platform("tpu"):
    compiled = gradient.lower(x, x, x, variables).compile()
  return compiled, time.perf_counter() - start


def main() -> None:
  """Compiles and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--topology", default="v5e:2x4")
  parser.add_argument("--length", type=int, default=2**20)
  parser.add_argument("--num_heads", type=int, default=8)
  parser.add_argument("--head_dim", type=int, default=64)
  parser.add_argument("--num_features", type=int, default=256)
  args = parser.parse_args()
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=args.topology
  )
  devices = np.array(topology.devices)
  mesh = Mesh(devices, ("sequence",), axis_types=(AxisType.Auto,))
  mib = lambda count: f"{count / 2**20:,.1f}"
  table = Table("attention", "arguments", "temporary", "peak", "traffic", "s")
  for is_causal in (False, True):
    compiled, seconds = compile_one(mesh, args, is_causal)
    plan = compiled.memory_analysis()
    traffic = [
      BYTES[kind] * int(np.prod([int(n) for n in shape.split(",") if n] or [1]))
      for kind, shape, _ in COLLECTIVE.findall(compiled.as_text())
    ]
    table.add_row(
      "causal" if is_causal else "bidirectional",
      mib(plan.argument_size_in_bytes),
      mib(plan.temp_size_in_bytes),
      mib(plan.peak_memory_in_bytes),
      f"{mib(sum(traffic))}, largest {mib(max(traffic))}",
      f"{seconds:.0f}",
    )
  console = Console(width=100)
  console.print(
    f"{args.length:,} tokens, {args.num_heads} heads of {args.head_dim}, "
    f"{args.num_features} features, {len(devices)} chips of {args.topology}; "
    "MiB a chip"
  )
  console.print(table)


if __name__ == "__main__":
  main()
