"""Compiles the Pallas kernels for accelerators, without having them.

    python -m benchmarks.compile_kernels --targets=v5e,v6e --csv=compiled.csv

The real compilers run, with their limits on VMEM and shared memory; nothing is
executed. TPU targets need libtpu (`pip install "jax[tpu]"`), h100 needs JAX's
CUDA plugin (`pip install "jax[cuda13-local]"`, and
JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 where there is no CUDA). One row for each
target, head dim and number of features, causal or not:

  forward, both   seconds to compile the forward pass, and forward and backward
  temporary       MiB of device memory that forward and backward take beside
                  their arguments and results

The exit status is 1 if anything fails to compile.
"""

import argparse
import csv
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import spectraformer_jax as sf
from spectraformer_jax.linear_attention import for_platform

# What XLA would otherwise ask the device; a file of the OpenXLA repository.
H100 = pathlib.Path(__file__).parent / "h100.txtpb"

PLATFORMS = {"v5e": "tpu", "v6e": "tpu", "h100": "gpu"}


class Result(NamedTuple):
  """One row; fields after `is_causal` are None if compilation failed."""

  target: str
  head_dim: int
  num_features: int
  is_causal: bool
  forward: float | None
  both: float | None
  temporary: float | None
  error: str | None


def device_of(target: str):
  """Returns a described device: programs compile for it but cannot run."""
  if PLATFORMS[target] == "tpu":
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{target}:2x2"
    )
  else:
    topology = topologies.get_topology_desc(
      platform="cuda",
      topology_name="",
      topology="1x1x1",
      target_config=H100.read_text(),
    )
  return topology.devices[0]


def compile_attention(
  target: str,
  *,
  head_dim: int,
  num_features: int,
  is_causal: bool,
  component: str = "posrf",
  length: int = 4096,
  batch: int = 2,
  heads: int = 8,
) -> Result:
  """Compiles attention with a key mask on bfloat16 inputs.

  Args:
    target: a key of `PLATFORMS`.
    head_dim: H, also of values.
    num_features: M.
    is_causal: whether query i sees only keys 0..i.
    component: one of the exponential family that needs no statistics.
    length: T.
    batch: B.
    heads: N.
  """
  platform = PLATFORMS[target]
  feature_map = sf.feature_map(component, "orf", num_features=num_features)

  def attend(variables, query, key, value, key_mask):
    return sf.spectral_attention(
      query,
      key,
      value,
      feature_map=feature_map,
      variables=variables,
      key_mask=key_mask,
      is_causal=is_causal,
      implementation=f"pallas_{platform}",
    )

  def loss(variables, *arrays):
    return jnp.sum(attend(variables, *arrays).astype(jnp.float32))

  variables = jax.eval_shape(
    lambda rng: feature_map.init(rng, head_dim=head_dim, num_heads=heads),
    jax.random.key(0),
  )
  x = jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.bfloat16)
  mask = jax.ShapeDtypeStruct((batch, length), jnp.bool_)
  row = target, head_dim, num_features, is_causal
  seconds = []
  for function in (attend, jax.grad(loss, (1, 2, 3))):
    start = time.perf_counter()
    try:
      with for_platform(platform):
        compiled = _compile(function, (variables, x, x, x, mask), target)
    except Exception as error:  # Compilers raise all kinds.
      return Result(*row, None, None, None, f"{type(error).__name__}: {error}")
    seconds.append(time.perf_counter() - start)
  temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
  return Result(*row, *seconds, temporary, None)


def _compile(function, arguments, target: str):
  """Compiles the program for one device of that kind."""
  mesh = Mesh(np.array([device_of(target)]), ("device",))
  sharding = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
    arguments,
  )
  return jax.jit(function).lower(*arguments).compile()


def cells(result: Result) -> list[str]:
  """Formats a line of the table."""
  figure = lambda value: "-" if value is None else f"{value:.1f}"
  return [
    result.target,
    str(result.head_dim),
    str(result.num_features),
    "yes" if result.is_causal else "no",
    figure(result.forward),
    figure(result.both),
    figure(result.temporary),
    "ok" if result.error is None else result.error.splitlines()[0],
  ]


HEADER = (
  "target",
  "head_dim",
  "M",
  "causal",
  "forward, s",
  "both, s",
  "temporary, MiB",
  "verdict",
)


def main(argv: Sequence[str] | None = None) -> list[Result]:
  """Compiles, prints, writes the CSV of --csv; returns the results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  names = lambda text: text.split(",")
  numbers = lambda text: [int(number) for number in names(text)]
  parser.add_argument("--targets", type=names, default=list(PLATFORMS))
  parser.add_argument("--head_dims", type=numbers, default=[32, 64, 128])
  parser.add_argument("--num_features", type=numbers, default=[128, 256])
  parser.add_argument("--component", default="posrf")
  parser.add_argument("--length", type=int, default=4096)
  parser.add_argument("--csv", help="file to write")
  args = parser.parse_args(argv)
  results = [
    compile_attention(
      target,
      head_dim=head_dim,
      num_features=num_features,
      is_causal=is_causal,
      component=args.component,
      length=args.length,
    )
    for target in args.targets
    for head_dim in args.head_dims
    for num_features in args.num_features
    for is_causal in (False, True)
  ]
  table = Table(title=f"{args.component}-orf, bfloat16, T={args.length}")
  for name in HEADER:
    table.add_column(name, justify="left" if name == "verdict" else "right")
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
  sys.exit(any(result.error for result in main()))
