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

from spectraformer_jax.linear_attention import pallas_scan
from spectraformer_jax.typing import Array, PyTree

# Positions in a chunk; rows of masks come in whole tiles of 128.
CAUSAL_CHUNK = 256
BLOCK = 512
LANES = 128
# Two bfloat16 numbers share a register.
SUBLANES = 16
# What the compilers for v5e and v6e give to one kernel at least.
VMEM = 16 * 2**20

PRIMITIVES = pallas_scan.PRIMITIVES | {"concatenate"}


def chunk_size(
  asked: int | None, length: int, num_keys: int, is_causal: bool
) -> int:
  """The size asked for (None: a default), as the hardware can do it."""
  size = asked or (CAUSAL_CHUNK if is_causal else BLOCK)
  longest = max(length, num_keys)
  if longest <= size:
    return _round_up(longest, SUBLANES)
  return _round_up(size, LANES)


def _round_up(size: int, multiple: int) -> int:
  """The next multiple."""
  return -(-size // multiple) * multiple


def too_big(sizes: pallas_scan.Sizes) -> str | None:
  """Why tiles of these sizes do not fit into VMEM, if so."""
  needed = vmem_bytes(sizes)
  if needed <= VMEM:
    return None
  return (
    f"the backward pass would take about {needed} bytes of VMEM of {VMEM}, "
    f"with {sizes}"
  )


def vmem_bytes(sizes: pallas_scan.Sizes) -> int:
  """What the backward kernel takes; above what compilers were seen to use."""
  tile = lambda rows, columns, item_bytes=4: (
    _round_up(rows, SUBLANES) * _round_up(columns, LANES) * item_bytes
  )
  chunk, features = sizes.chunk, sizes.feature_dim
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
    batch, heads, length, _ = xs[0].shape
    count = length // self.chunk
    inputs = constants, carry, xs, mask
    ys = [
      jax.ShapeDtypeStruct((batch, heads, length, y.shape[1]), y.dtype)
      for y in pallas_scan.shapes_of_ys(self.step, self.chunk, *inputs)
    ]
    kept = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(
        (*a.shape[:2], count, *a.shape[2:]), a.dtype
      ),
      carry if keeps else [],
    )

    def kernel(inputs, outputs):
      constants, carry, xs, mask = inputs
      last, ys, kept = outputs

      @pl.when(pl.program_id(2) == 0)
      def _():
        _write(last, _read(carry))

      before = _read(last)
      if keeps:
        _write(kept, before)
      after, out = self.step(_read(constants), before, _read(xs), _column(mask))
      _write(last, after)
      _write(ys, out)

    specs = (
      jax.tree.map(_whole, (constants, carry)),
      jax.tree.map(self._chunk_spec, xs),
      self._mask_spec(mask),
    )
    return self._call(
      kernel,
      inputs,
      (*specs[0], *specs[1:]),
      (carry, ys, kept),
      (
        jax.tree.map(_whole, carry),
        jax.tree.map(self._chunk_spec, ys),
        jax.tree.map(_kept_spec, kept),
      ),
      count,
    )

  def backward(self, constants, wanted, kept, xs, mask, d_last, d_ys):
    """See `pallas_scan.Calls`."""
    batch, heads, length, _ = xs[0].shape
    count = length // self.chunk
    backwards = lambda c: count - 1 - c
    of_chunk = functools.partial(self._chunk_spec, order=backwards)
    of_kept = functools.partial(_kept_or_whole, order=backwards)
    d_constants = [
      jax.ShapeDtypeStruct((batch, heads, *a.shape[2:]), a.dtype)
      for a, is_wanted in zip(constants, wanted, strict=True)
      if is_wanted
    ]

    def kernel(inputs, outputs):
      constants, kept, xs, mask, d_last, d_ys = inputs
      d_constants, d_carry, d_xs = outputs

      @pl.when(pl.program_id(2) == 0)
      def _():
        _write(d_carry, _read(d_last))
        for ref in d_constants:
          ref[...] = jnp.zeros(ref.shape, ref.dtype)

      more, d_before, d_chunk = pallas_scan.pull_back(
        self.step,
        _read(constants),
        wanted,
        *(_read(kept), _read(xs), _column(mask)),
        (_read(d_carry), _read(d_ys)),
      )
      for ref, d in zip(d_constants, more, strict=True):
        ref[...] += d
      _write(d_carry, d_before)
      _write(d_xs, d_chunk)

    return self._call(
      kernel,
      (constants, kept, xs, mask, d_last, d_ys),
      (
        jax.tree.map(_whole, constants),
        jax.tree.map(of_kept, kept),
        jax.tree.map(of_chunk, xs),
        self._mask_spec(mask, order=backwards),
        jax.tree.map(_whole, d_last),
        jax.tree.map(of_chunk, d_ys),
      ),
      (d_constants, d_last, xs),
      (
        jax.tree.map(_whole, d_constants),
        jax.tree.map(_whole, d_last),
        jax.tree.map(of_chunk, xs),
      ),
      count,
    )

  def _call(self, kernel, inputs, in_specs, outputs, out_specs, count):
    """`pl.pallas_call` of trees of arrays."""
    flat_inputs, in_tree = jax.tree.flatten(inputs)
    flat_outputs, out_tree = jax.tree.flatten(outputs)

    def flat_kernel(*refs):
      kernel(
        in_tree.unflatten(refs[: len(flat_inputs)]),
        out_tree.unflatten(refs[len(flat_inputs) :]),
      )

    batch, heads = flat_outputs[0].shape[:2]
    outs = pl.pallas_call(
      flat_kernel,
      grid=(batch, heads, count),
      in_specs=jax.tree.leaves(in_specs),
      out_specs=jax.tree.leaves(out_specs),
      out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in flat_outputs],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      interpret=self.interpret,
    )(*flat_inputs)
    return out_tree.unflatten(outs)

  def _chunk_spec(self, array, order=lambda c: c):
    """Chunks of ``[B, N, T, K]``."""
    return pl.BlockSpec(
      (None, None, self.chunk, array.shape[3]),
      lambda b, n, c: (b, n, order(c), 0),
    )

  def _mask_spec(self, mask, order=lambda c: c):
    """Chunks of ``[B, T]``, as rows."""
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


def _read(refs: PyTree) -> PyTree:
  """The blocks."""
  return jax.tree.map(lambda ref: ref[...], refs)


def _write(refs: PyTree, values: PyTree) -> None:
  """Writes the blocks."""
  for ref, value in zip(
    jax.tree.leaves(refs), jax.tree.leaves(values), strict=True
  ):
    ref[...] = value


def _column(mask) -> Array | None:
  """A row ``[1, C]`` of 0 and 1 as bools ``[C, 1]``."""
  if mask is None:
    return None
  # Mosaic transposes whole tiles of eight rows.
  rows = jnp.broadcast_to(mask[...], (8, mask.shape[1]))
  return rows.T[:, :1] > 0.0
