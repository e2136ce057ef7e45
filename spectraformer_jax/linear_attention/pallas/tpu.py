"""A scan over the chunks of each head, as one TPU kernel for each direction.

The grid goes over examples, heads and, one after another, chunks; the carry is
an output block that stays on chip. The backward kernel goes from the last chunk
to the first and differentiates the body inside the kernel.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from typing_extensions import override

from spectraformer_jax.linear_attention.pallas import scan
from spectraformer_jax.linear_attention.pallas.scan import (
  BackwardInputs,
  BackwardOutputs,
  ForwardInputs,
  ForwardOutputs,
  read,
  write,
)
from spectraformer_jax.typing import Array, PyTree

# The index of a chunk in the grid -> its place in the sequence.
Order = Callable[[Array], Array]


def _forwards(c: Array) -> Array:
  return c


# Default positions of a chunk, causal and not. Never timed.
CAUSAL_CHUNK = 256
BLOCK = 512
# Chunks of a long sequence are multiples of LANES, because the mask of a chunk
# is a row; those of a short one are multiples of SUBLANES, since two bfloat16
# numbers share a register.
LANES = 128
SUBLANES = 16
# The compilers for v5e and v6e give at least this many bytes to one kernel.
VMEM = 16 * 2**20

PRIMITIVES = scan.PRIMITIVES | {"concatenate"}


def fit(sizes: scan.Sizes, chunk_size: int | None) -> scan.Tile | str:
  """Returns a tile of `chunk_size`, rounded up to what the hardware can do.

  A `chunk_size` of None stands for `CAUSAL_CHUNK` or `BLOCK`. Where the tile
  does not fit into VMEM, the result says why.
  """
  chunk = chunk_size or (CAUSAL_CHUNK if sizes.is_causal else BLOCK)
  if sizes.length <= chunk:
    chunk = _round_up(sizes.length, SUBLANES)
  else:
    chunk = _round_up(chunk, LANES)
  needed = vmem_bytes(sizes, chunk)
  if needed > VMEM:
    return (
      f"the backward pass would take about {needed} bytes of VMEM of {VMEM}, "
      f"with chunks of {chunk} and {sizes}"
    )
  return scan.Tile(chunk, sizes.value_dim)


def _round_up(size: int, multiple: int) -> int:
  """Returns the size rounded up to a multiple."""
  return -(-size // multiple) * multiple


def vmem_bytes(sizes: scan.Sizes, chunk: int) -> int:
  """Returns a bound on the bytes of VMEM of the backward kernel.

  It was found from compiled cases.
  """

  def tile(rows: int, columns: int, item_bytes: int = 4) -> int:
    return _round_up(rows, SUBLANES) * _round_up(columns, LANES) * item_bytes

  features = sizes.feature_dim
  sums = tile(sizes.value_dim, features) + 2 * tile(1, features)
  widest = max(sizes.head_dim, sizes.value_dim)
  # Blocks hold constants and sums with their gradients; query, key and value;
  # the gradients of these three and of the output.
  blocks = 2 * sum(tile(*shape) for shape in sizes.constants) + 3 * sums
  blocks += 7 * tile(chunk, widest, sizes.item_bytes)
  temporary = 5 * tile(chunk, features)
  if sizes.is_causal:
    temporary += 3 * tile(chunk, chunk)
  # Blocks count twice, because while one is in use the next one is read and the
  # previous one is written.
  return 2 * blocks + temporary


class Calls(scan.Calls):
  """Kernels for Mosaic, on a grid of examples, heads and chunks."""

  @override
  def forward(self, inputs: ForwardInputs, *, saves: bool) -> ForwardOutputs:
    def kernel(inputs: ForwardInputs, outputs: ForwardOutputs) -> None:
      @pl.when(pl.program_id(2) == 0)
      def _() -> None:
        write(outputs.last, read(inputs.carry))

      constants, _, xs, mask = inputs
      before = read(outputs.last)
      if saves:
        write(outputs.saved, before)
      after, ys = self.step(read(constants), before, read(xs), _column(mask))
      write(outputs.last, after)
      write(outputs.ys, ys)

    in_specs = ForwardInputs(
      jax.tree.map(_whole, inputs.constants),
      jax.tree.map(_whole, inputs.carry),
      jax.tree.map(self._chunk_spec, inputs.xs),
      self._mask_spec(inputs.mask),
    )
    outputs = self.forward_shapes(inputs, saves)
    out_specs = ForwardOutputs(
      jax.tree.map(_whole, outputs.last),
      jax.tree.map(self._chunk_spec, outputs.ys),
      jax.tree.map(_saved_spec, outputs.saved),
    )
    return self._call(kernel, inputs, in_specs, outputs, out_specs)

  @override
  def backward(
    self, inputs: BackwardInputs, wanted: list[bool]
  ) -> BackwardOutputs:
    last_chunk = inputs.xs[0].shape[2] // self.chunk_size - 1
    order = lambda c: last_chunk - c
    in_chunks = functools.partial(self._chunk_spec, order=order)

    def saved_spec(array: Array) -> pl.BlockSpec:
      is_of_chunk = len(array.shape) == 5
      return _saved_spec(array, order) if is_of_chunk else _whole(array)

    def kernel(inputs: BackwardInputs, outputs: BackwardOutputs) -> None:
      @pl.when(pl.program_id(2) == 0)
      def _() -> None:
        write(outputs.d_carry, read(inputs.d_last))
        for ref in outputs.d_constants:
          ref[...] = jnp.zeros(ref.shape, ref.dtype)

      block = read(inputs._replace(mask=None, d_last=None))._replace(
        mask=_column(inputs.mask), d_last=read(outputs.d_carry)
      )
      d_constants, d_before, d_xs = self.pull_back(block, wanted)
      for ref, d in zip(outputs.d_constants, d_constants, strict=True):
        ref[...] += d
      write(outputs.d_carry, d_before)
      write(outputs.d_xs, d_xs)

    in_specs = BackwardInputs(
      jax.tree.map(_whole, inputs.constants),
      jax.tree.map(saved_spec, inputs.saved),
      jax.tree.map(in_chunks, inputs.xs),
      self._mask_spec(inputs.mask, order),
      jax.tree.map(_whole, inputs.d_last),
      jax.tree.map(in_chunks, inputs.d_ys),
    )
    outputs = scan.backward_shapes(inputs, wanted)
    out_specs = BackwardOutputs(
      jax.tree.map(_whole, outputs.d_constants),
      jax.tree.map(_whole, outputs.d_carry),
      jax.tree.map(in_chunks, outputs.d_xs),
    )
    return self._call(kernel, inputs, in_specs, outputs, out_specs)

  def _call(
    self,
    kernel: Callable[[PyTree, PyTree], None],
    inputs: ForwardInputs | BackwardInputs,
    in_specs: PyTree,
    outputs: PyTree,
    out_specs: PyTree,
  ) -> PyTree:
    """Runs a kernel over examples, heads and chunks."""
    batch, heads, length, _ = inputs.xs[0].shape
    call = functools.partial(
      pl.pallas_call,
      grid=(batch, heads, length // self.chunk_size),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      interpret=self.interpret,
    )
    return scan.call_on_trees(
      call, kernel, inputs, in_specs, outputs, out_specs
    )

  def _chunk_spec(self, array: Array, order: Order = _forwards) -> pl.BlockSpec:
    """Returns the spec of a chunk of ``[B, N, T, K]``."""
    return pl.BlockSpec(
      (None, None, self.chunk_size, array.shape[3]),
      lambda b, n, c: (b, n, order(c), 0),
    )

  def _mask_spec(
    self, mask: Array | None, order: Order = _forwards
  ) -> pl.BlockSpec | None:
    """Returns the spec of a chunk of ``[B, 1, T]``, as a row."""
    if mask is None:
      return None
    shape = (None, 1, self.chunk_size)
    return pl.BlockSpec(shape, lambda b, n, c: (b, 0, order(c)))


def _whole(array: Array) -> pl.BlockSpec:
  """Returns the spec of all that a head has of ``[B or 1, N or 1, R, K]``."""
  per_example, per_head = (size > 1 for size in array.shape[:2])
  return pl.BlockSpec(
    (None, None, *array.shape[2:]),
    lambda b, n, c: (b if per_example else 0, n if per_head else 0, 0, 0),
  )


def _saved_spec(array: Array, order: Order = _forwards) -> pl.BlockSpec:
  """Returns the spec of one chunk's carry, of ``[B, N, T / C, R, K]``."""
  return pl.BlockSpec(
    (None, None, None, *array.shape[3:]), lambda b, n, c: (b, n, order(c), 0, 0)
  )


def _column(mask: Array | None) -> Array | None:
  """Reads a mask ``[1, C]`` of 0 and 1, as bools ``[C, 1]``."""
  if mask is None:
    return None
  # Mosaic can transpose only whole tiles of eight rows.
  rows = jnp.broadcast_to(mask[...], (8, mask.shape[1]))
  return rows.T[:, :1] > 0.0
