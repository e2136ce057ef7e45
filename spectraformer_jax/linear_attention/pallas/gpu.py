"""A scan over the chunks of each head, as one GPU kernel for each direction.

Written for Triton: one program for each example and head loops over chunks with
the carry in registers. The backward program loops from the last chunk to the
first and differentiates the body inside the kernel.
"""

import functools
import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
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

# Default positions of a chunk. Never timed.
CHUNK = 64
SMALLEST = scan.SMALLEST_CHUNK
NUM_WARPS = 8
# Bytes of shared memory that one program may use on an H100.
SHARED_MEMORY = 232_448
PRIMITIVES = scan.PRIMITIVES
# The start of a warning that JAX gives from 0.11 on. It is silenced, because
# users of the kernels can do nothing about it.
TRITON_WARNING = "The Pallas Triton backend is deprecated"


def fit(sizes: scan.Sizes, chunk_size: int | None) -> scan.Tile | str:
  """Returns the largest tile up to `chunk_size` that shared memory holds.

  `chunk_size` is rounded up to a power of two; None: `CHUNK`. Where no tile
  fits, the result says why.
  """
  dims = {
    name: getattr(sizes, name)
    for name in ("head_dim", "value_dim", "feature_dim")
  }
  if any(size != _power_of_two(size) for size in dims.values()):
    return f"it takes powers of two from {SMALLEST}, not {dims}"
  chunk = _power_of_two(min(chunk_size or CHUNK, sizes.length))
  value_dim = sizes.value_dim
  while (needed := shared_bytes(sizes, chunk, value_dim)) > SHARED_MEMORY:
    if max(chunk, value_dim) == SMALLEST:
      return (
        f"the backward pass would take about {needed} bytes of shared memory "
        f"of {SHARED_MEMORY}, even with the smallest tiles, with {sizes}"
      )
    if chunk >= value_dim:
      chunk //= 2
    else:
      value_dim //= 2
  return scan.Tile(chunk, value_dim)


def _power_of_two(size: int) -> int:
  """Returns the next power of two, at least `SMALLEST`."""
  return max(SMALLEST, 1 << (size - 1).bit_length())


def shared_bytes(sizes: scan.Sizes, chunk: int, value_dim: int) -> int:
  """Returns a bound on the bytes of shared memory of the backward kernel.

  It is above what the compiler used for the cases in docs/kernels.md.
  """
  # Operands of matrix products: constants; sums and their gradient; features
  # and their gradients; values.
  numbers = sum(math.prod(shape) for shape in sizes.constants if min(shape) > 1)
  sums, of_tokens = (2, 4) if sizes.is_causal else (1, 2)
  numbers += sizes.feature_dim * (sums * value_dim + of_tokens * chunk)
  return 4 * (numbers + chunk * value_dim)


class Calls(scan.Calls):
  """Kernels for Triton: one program for each example and head."""

  @override
  def forward(self, inputs: ForwardInputs, *, saves: bool) -> ForwardOutputs:
    count = inputs.xs[0].shape[2] // self.chunk_size

    def kernel(inputs: ForwardInputs, outputs: ForwardOutputs) -> None:
      def body(c: Array, carry: PyTree) -> PyTree:
        if saves:
          write(outputs.saved, carry, c)
        carry, ys = self.step(
          read(inputs.constants),
          carry,
          self._chunks(inputs.xs, c),
          self._column(inputs.mask, c),
        )
        self._write_chunks(outputs.ys, ys, c)
        return carry

      carry = read(inputs.carry)
      write(outputs.last, jax.lax.fori_loop(0, count, body, carry))

    return self._call(kernel, inputs, self.forward_shapes(inputs, saves))

  @override
  def backward(
    self, inputs: BackwardInputs, wanted: list[bool]
  ) -> BackwardOutputs:
    count = inputs.xs[0].shape[2] // self.chunk_size

    def kernel(inputs: BackwardInputs, outputs: BackwardOutputs) -> None:
      def body(index: Array, carry: tuple[list[Array], PyTree]) -> PyTree:
        total, d_after = carry
        c = count - 1 - index
        of_chunk = lambda ref: ref[c] if ref.ndim == 3 else ref[...]
        block = BackwardInputs(
          read(inputs.constants),
          jax.tree.map(of_chunk, inputs.saved),
          self._chunks(inputs.xs, c),
          self._column(inputs.mask, c),
          d_after,
          self._chunks(inputs.d_ys, c),
        )
        more, d_before, d_xs = self.pull_back(block, wanted)
        self._write_chunks(outputs.d_xs, d_xs, c)
        return jax.tree.map(jnp.add, total, more), d_before

      zeros = [jnp.zeros(ref.shape, ref.dtype) for ref in outputs.d_constants]
      carry = zeros, read(inputs.d_last)
      total, d_first = jax.lax.fori_loop(0, count, body, carry)
      write(outputs.d_constants, total)
      write(outputs.d_carry, d_first)

    return self._call(kernel, inputs, scan.backward_shapes(inputs, wanted))

  def _call(
    self,
    kernel: Callable[[PyTree, PyTree], None],
    inputs: PyTree,
    outputs: PyTree,
  ) -> PyTree:
    """Runs a kernel once for each example and head, on its whole arrays."""
    # JAX warns when the program is lowered, after this returns, so a filter
    # that ends here would come too early.
    warnings.filterwarnings(
      "ignore", message=TRITON_WARNING, category=DeprecationWarning
    )
    call = functools.partial(
      pl.pallas_call,
      grid=jax.tree.leaves(outputs)[0].shape[:2],
      compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
      interpret=self.interpret,
    )
    in_specs, out_specs = jax.tree.map(_whole, (inputs, outputs))
    return scan.call_on_trees(
      call, kernel, inputs, in_specs, outputs, out_specs
    )

  def _at(self, c: Array) -> slice | pl.Slice:
    """Returns the positions of chunk c."""
    return pl.ds(c * self.chunk_size, self.chunk_size)

  def _chunks(self, refs: list[Array], c: Array) -> list[Array]:
    """Reads chunk c of ``[T, K]``."""
    return [ref[self._at(c), :] for ref in refs]

  def _write_chunks(self, refs: list, values: list[Array], c: Array) -> None:
    """Writes chunk c of ``[T, K]``."""
    for ref, value in zip(refs, values, strict=True):
      ref[self._at(c), :] = value

  def _column(self, mask: Array | None, c: Array) -> Array | None:
    """Reads chunk c of a mask ``[T]`` of 0 and 1, as bools ``[C, 1]``."""
    return None if mask is None else mask[self._at(c)][:, None] > 0.0


def _whole(array: Array) -> pl.BlockSpec:
  """Returns the spec of all that a head has of ``[B or 1, N or 1, ...]``."""
  per_example, per_head = (size > 1 for size in array.shape[:2])
  zeros = (0,) * (len(array.shape) - 2)
  return pl.BlockSpec(
    (None, None, *array.shape[2:]),
    lambda b, n: (b if per_example else 0, n if per_head else 0, *zeros),
  )
