"""A scan over the chunks of each head, as one GPU kernel in each direction.

Written for Triton: one program for each example and head loops over chunks with
the carry in registers. The backward program loops from the last chunk to the
first and differentiates the body in place.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spectraformer_jax.linear_attention.pallas import scan as pallas_scan
from spectraformer_jax.linear_attention.pallas.scan import read, write
from spectraformer_jax.typing import Array

CHUNK = 64
SMALLEST = pallas_scan.SMALLEST_CHUNK
NUM_WARPS = 8
# What one program may take on an H100.
SHARED_MEMORY = 232_448
PRIMITIVES = pallas_scan.PRIMITIVES
# JAX says so from 0.11 on. Nobody who uses the kernels can act on it.
TRITON_WARNING = "The Pallas Triton backend is deprecated"


def fit(sizes: pallas_scan.Sizes, asked: int | None) -> pallas_scan.Tile | str:
  """At most the chunk asked for (None: a default), as the hardware can do it.

  Returns:
    The largest tile, or in words why none fits into shared memory.
  """
  dims = {
    name: getattr(sizes, name)
    for name in ("head_dim", "value_dim", "feature_dim")
  }
  if any(size != _power_of_two(size) for size in dims.values()):
    return f"it takes powers of two from {SMALLEST}, not {dims}"
  chunk = min(_power_of_two(asked or CHUNK), _power_of_two(sizes.length))
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
  return pallas_scan.Tile(chunk, value_dim)


def _power_of_two(size: int) -> int:
  """The next power of two, from `SMALLEST`."""
  return max(SMALLEST, 1 << (size - 1).bit_length())


def shared_bytes(sizes: pallas_scan.Sizes, chunk: int, value_dim: int) -> int:
  """What the backward kernel takes; above what the compiler was seen to use."""
  # Operands of matrix products: constants; sums and their gradient; features
  # and theirs; values.
  numbers = sum(math.prod(shape) for shape in sizes.constants if min(shape) > 1)
  sums, of_tokens = (2, 4) if sizes.is_causal else (1, 2)
  numbers += sizes.feature_dim * (sums * value_dim + of_tokens * chunk)
  return 4 * (numbers + chunk * value_dim)


@dataclasses.dataclass(frozen=True)
class Calls:
  """See `pallas_scan.Calls`.

  Attributes:
    step: the work on one chunk.
    chunk: its size.
    interpret: as in `pl.pallas_call`.
  """

  step: pallas_scan.Step
  chunk: int
  interpret: Any = False

  def forward(self, constants, carry, xs, mask, *, keeps):
    """See `pallas_scan.Calls`."""
    inputs = constants, carry, xs, mask
    outputs = pallas_scan.outputs_of_forward(
      self.step, self.chunk, inputs, keeps=keeps
    )
    count = xs[0].shape[2] // self.chunk

    def kernel(inputs, outputs):
      constants, carry, xs, mask = inputs
      last, ys, kept = outputs

      def body(c, carry):
        if keeps:
          write(kept, carry, c)
        carry, out = self.step(
          read(constants), carry, self._chunks(xs, c), self._column(mask, c)
        )
        self._write_chunks(ys, out, c)
        return carry

      write(last, jax.lax.fori_loop(0, count, body, read(carry)))

    return self._call(kernel, inputs, outputs)

  def backward(self, constants, wanted, kept, xs, mask, d_last, d_ys):
    """See `pallas_scan.Calls`."""
    count = xs[0].shape[2] // self.chunk

    def kernel(inputs, outputs):
      constants, kept, xs, mask, d_last, d_ys = inputs
      d_constants, d_carry, d_xs = outputs

      def body(step, carry):
        total, d_after = carry
        c = count - 1 - step
        more, d_before, d_chunk = pallas_scan.pull_back(
          self.step,
          read(constants),
          wanted,
          jax.tree.map(lambda ref: ref[c] if ref.ndim == 3 else ref[...], kept),
          self._chunks(xs, c),
          self._column(mask, c),
          (d_after, self._chunks(d_ys, c)),
        )
        self._write_chunks(d_xs, d_chunk, c)
        return jax.tree.map(jnp.add, total, more), d_before

      zeros = [jnp.zeros(ref.shape, ref.dtype) for ref in d_constants]
      carry = zeros, read(d_last)
      total, d_first = jax.lax.fori_loop(0, count, body, carry)
      write(d_constants, total)
      write(d_carry, d_first)

    return self._call(
      kernel,
      (constants, kept, xs, mask, d_last, d_ys),
      pallas_scan.outputs_of_backward(constants, wanted, d_last, xs),
    )

  def _call(self, kernel, inputs, outputs):
    """Runs a kernel over examples and heads, each with all that is theirs."""
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
    specs = jax.tree.map(_whole, (inputs, outputs))
    return pallas_scan.call_on_trees(
      call, kernel, inputs, specs[0], outputs, specs[1]
    )

  def _at(self, c):
    """Positions of chunk c."""
    return pl.ds(c * self.chunk, self.chunk)

  def _chunks(self, refs, c) -> list[Array]:
    """Chunk c of ``[T, K]``."""
    return [ref[self._at(c), :] for ref in refs]

  def _write_chunks(self, refs, values, c) -> None:
    """Writes chunk c of ``[T, K]``."""
    for ref, value in zip(refs, values, strict=True):
      ref[self._at(c), :] = value

  def _column(self, mask, c) -> Array | None:
    """Chunk c of ``[T]``, 0 and 1, as bools ``[C, 1]``."""
    return None if mask is None else mask[self._at(c)][:, None] > 0.0


def _whole(array) -> pl.BlockSpec:
  """All that belongs to a head, of ``[B or 1, N or 1, ...]``."""
  per_example, per_head = (size > 1 for size in array.shape[:2])
  zeros = (0,) * (len(array.shape) - 2)
  return pl.BlockSpec(
    (None, None, *array.shape[2:]),
    lambda b, n: (b if per_example else 0, n if per_head else 0, *zeros),
  )
