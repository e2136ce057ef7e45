"""A scan over the chunks of each head, as one TPU kernel in each direction.

The grid goes over examples, heads and chunks; chunks one after another, with
the carry in an output block that stays on chip. The backward kernel walks the
chunks from the last to the first and differentiates the body in place.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spectraformer_jax.linear_attention.pallas import scan as pallas_scan
from spectraformer_jax.linear_attention.pallas.scan import read, write
from spectraformer_jax.typing import Array

# Positions in a chunk; rows of masks come in whole tiles of 128.
CAUSAL_CHUNK = 256
BLOCK = 512
LANES = 128
# Two bfloat16 numbers share a register.
SUBLANES = 16
# What the compilers for v5e and v6e give to one kernel at least.
VMEM = 16 * 2**20

PRIMITIVES = pallas_scan.PRIMITIVES | {"concatenate"}


def fit(sizes: pallas_scan.Sizes, asked: int | None) -> pallas_scan.Tile | str:
  """The chunk asked for (None: a default), as the hardware can do it.

  Returns:
    A tile, or in words why none fits into VMEM.
  """
  chunk = asked or (CAUSAL_CHUNK if sizes.is_causal else BLOCK)
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
  return pallas_scan.Tile(chunk, sizes.value_dim)


def _round_up(size: int, multiple: int) -> int:
  """The next multiple."""
  return -(-size // multiple) * multiple


def vmem_bytes(sizes: pallas_scan.Sizes, chunk: int) -> int:
  """What the backward kernel takes; above what compilers were seen to use."""
  tile = lambda rows, columns, item_bytes=4: (
    _round_up(rows, SUBLANES) * _round_up(columns, LANES) * item_bytes
  )
  features = sizes.feature_dim
  sums = tile(sizes.value_dim, features) + 2 * tile(1, features)
  inputs = max(sizes.head_dim, sizes.value_dim)
  # Blocks: constants and sums with their gradients; query, key, value, the
  # gradients of these three and of the output.
  blocks = 2 * sum(tile(*shape) for shape in sizes.constants) + 3 * sums
  blocks += 7 * tile(chunk, inputs, sizes.item_bytes)
  temporary = 5 * tile(chunk, features)
  if sizes.is_causal:
    temporary += 3 * tile(chunk, chunk)
  # While one block is worked on, the next one comes and the last one goes.
  return 2 * blocks + temporary


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

    def kernel(inputs, outputs):
      constants, carry, xs, mask = inputs
      last, ys, kept = outputs

      @pl.when(pl.program_id(2) == 0)
      def _():
        write(last, read(carry))

      before = read(last)
      if keeps:
        write(kept, before)
      after, out = self.step(read(constants), before, read(xs), _column(mask))
      write(last, after)
      write(ys, out)

    last, ys, kept = outputs
    return self._call(
      kernel,
      inputs,
      (
        *jax.tree.map(_whole, (constants, carry)),
        jax.tree.map(self._chunk_spec, xs),
        self._mask_spec(mask),
      ),
      outputs,
      (
        jax.tree.map(_whole, last),
        jax.tree.map(self._chunk_spec, ys),
        jax.tree.map(_kept_spec, kept),
      ),
      xs[0].shape,
    )

  def backward(self, constants, wanted, kept, xs, mask, d_last, d_ys):
    """See `pallas_scan.Calls`."""
    last_chunk = xs[0].shape[2] // self.chunk - 1
    order = lambda c: last_chunk - c
    of_chunk = functools.partial(self._chunk_spec, order=order)
    of_kept = functools.partial(_kept_or_whole, order=order)

    def kernel(inputs, outputs):
      constants, kept, xs, mask, d_last, d_ys = inputs
      d_constants, d_carry, d_xs = outputs

      @pl.when(pl.program_id(2) == 0)
      def _():
        write(d_carry, read(d_last))
        for ref in d_constants:
          ref[...] = jnp.zeros(ref.shape, ref.dtype)

      more, d_before, d_chunk = pallas_scan.pull_back(
        self.step,
        read(constants),
        wanted,
        *(read(kept), read(xs), _column(mask)),
        (read(d_carry), read(d_ys)),
      )
      for ref, d in zip(d_constants, more, strict=True):
        ref[...] += d
      write(d_carry, d_before)
      write(d_xs, d_chunk)

    outputs = pallas_scan.outputs_of_backward(constants, wanted, d_last, xs)
    return self._call(
      kernel,
      (constants, kept, xs, mask, d_last, d_ys),
      (
        jax.tree.map(_whole, constants),
        jax.tree.map(of_kept, kept),
        jax.tree.map(of_chunk, xs),
        self._mask_spec(mask, order),
        jax.tree.map(_whole, d_last),
        jax.tree.map(of_chunk, d_ys),
      ),
      outputs,
      (
        *jax.tree.map(_whole, outputs[:2]),
        jax.tree.map(of_chunk, xs),
      ),
      xs[0].shape,
    )

  def _call(self, kernel, inputs, in_specs, outputs, out_specs, shape):
    """Runs a kernel over examples, heads and chunks of ``[B, N, T, K]``."""
    batch, heads, length, _ = shape
    call = functools.partial(
      pl.pallas_call,
      grid=(batch, heads, length // self.chunk),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      interpret=self.interpret,
    )
    return pallas_scan.call_on_trees(
      call, kernel, inputs, in_specs, outputs, out_specs
    )

  def _chunk_spec(self, array, order=lambda c: c):
    """Chunks of ``[B, N, T, K]``."""
    return pl.BlockSpec(
      (None, None, self.chunk, array.shape[3]),
      lambda b, n, c: (b, n, order(c), 0),
    )

  def _mask_spec(self, mask, order=lambda c: c):
    """Chunks of ``[B, 1, T]``, as rows."""
    if mask is None:
      return None
    return pl.BlockSpec((None, 1, self.chunk), lambda b, n, c: (b, 0, order(c)))


def _whole(array) -> pl.BlockSpec:
  """All that belongs to a head, of ``[B or 1, N or 1, R, K]``."""
  per_example, per_head = (size > 1 for size in array.shape[:2])
  return pl.BlockSpec(
    (None, None, *array.shape[2:]),
    lambda b, n, c: (b if per_example else 0, n if per_head else 0, 0, 0),
  )


def _kept_spec(array, order=lambda c: c) -> pl.BlockSpec:
  """One chunk's carry, of ``[B, N, count, R, K]``."""
  return pl.BlockSpec(
    (None, None, None, *array.shape[3:]),
    lambda b, n, c: (b, n, order(c), 0, 0),
  )


def _kept_or_whole(array, order) -> pl.BlockSpec:
  """One for each chunk, or one for all."""
  return _kept_spec(array, order) if array.ndim == 5 else _whole(array)


def _column(mask) -> Array | None:
  """A row ``[1, C]`` of 0 and 1 as bools ``[C, 1]``."""
  if mask is None:
    return None
  # Mosaic transposes whole tiles of eight rows.
  rows = jnp.broadcast_to(mask[...], (8, mask.shape[1]))
  return rows.T[:, :1] > 0.0
