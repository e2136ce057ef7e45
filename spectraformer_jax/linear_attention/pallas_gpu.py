"""A scan over the chunks of each head, as one GPU kernel in each direction.

Written for Triton: one program for each example and head loops over chunks with
the carry in registers. The backward program loops from the last chunk to the
first and differentiates the body in place.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from spectraformer_jax.linear_attention import pallas_scan
from spectraformer_jax.typing import Array, PyTree

CHUNK = 64
# The least that a matrix unit takes.
SMALLEST = 16
NUM_WARPS = 8

PRIMITIVES = pallas_scan.PRIMITIVES


def chunk_size(
  asked: int | None, length: int, num_keys: int, is_causal: bool
) -> int:
  """The size asked for (None: a default), as the hardware can do it."""
  del is_causal
  longest = max(length, num_keys, SMALLEST)
  return min(_power_of_two(asked or CHUNK), _power_of_two(longest))


def _power_of_two(size: int) -> int:
  """The next power of two, from `SMALLEST`."""
  return max(SMALLEST, 1 << (size - 1).bit_length())


def too_big(sizes) -> str | None:
  """TODO."""


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

      def body(c, carry):
        if keeps:
          _write(kept, carry, c)
        carry, out = self.step(
          _read(constants), carry, self._chunks(xs, c), self._column(mask, c)
        )
        self._write_chunks(ys, out, c)
        return carry

      _write(last, jax.lax.fori_loop(0, count, body, _read(carry)))

    return self._call(kernel, inputs, (carry, ys, kept))

  def backward(self, constants, wanted, kept, xs, mask, d_last, d_ys):
    """See `pallas_scan.Calls`."""
    batch, heads, length, _ = xs[0].shape
    count = length // self.chunk
    d_constants = [
      jax.ShapeDtypeStruct((batch, heads, *a.shape[2:]), a.dtype)
      for a, is_wanted in zip(constants, wanted, strict=True)
      if is_wanted
    ]

    def kernel(inputs, outputs):
      constants, kept, xs, mask, d_last, d_ys = inputs
      d_constants, d_carry, d_xs = outputs

      def body(step, carry):
        total, d_after = carry
        c = count - 1 - step
        more, d_before, d_chunk = pallas_scan.pull_back(
          self.step,
          _read(constants),
          wanted,
          jax.tree.map(lambda ref: ref[c] if ref.ndim == 3 else ref[...], kept),
          self._chunks(xs, c),
          self._column(mask, c),
          (d_after, self._chunks(d_ys, c)),
        )
        self._write_chunks(d_xs, d_chunk, c)
        return jax.tree.map(jnp.add, total, more), d_before

      zeros = [jnp.zeros(ref.shape, ref.dtype) for ref in d_constants]
      total, d_first = jax.lax.fori_loop(0, count, body, (zeros, _read(d_last)))
      _write(d_constants, total)
      _write(d_carry, d_first)

    inputs = constants, kept, xs, mask, d_last, d_ys
    return self._call(kernel, inputs, (d_constants, d_last, xs))

  def _call(self, kernel, inputs, outputs):
    """`pl.pallas_call` of trees of arrays, each with all of a head's."""
    flat_inputs, in_tree = jax.tree.flatten(inputs)
    flat_outputs, out_tree = jax.tree.flatten(outputs)

    def flat_kernel(*refs):
      kernel(
        in_tree.unflatten(refs[: len(flat_inputs)]),
        out_tree.unflatten(refs[len(flat_inputs) :]),
      )

    outs = pl.pallas_call(
      flat_kernel,
      grid=flat_outputs[0].shape[:2],
      in_specs=[_whole(a) for a in flat_inputs],
      out_specs=[_whole(a) for a in flat_outputs],
      out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in flat_outputs],
      compiler_params=plgpu.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
      interpret=self.interpret,
    )(*flat_inputs)
    return out_tree.unflatten(outs)

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


def _read(refs: PyTree) -> PyTree:
  """The blocks."""
  return jax.tree.map(lambda ref: ref[...], refs)


def _write(refs: PyTree, values: PyTree, index: Any = ...) -> None:
  """Writes the blocks, or entry `index` of them."""
  for ref, value in zip(
    jax.tree.leaves(refs), jax.tree.leaves(values), strict=True
  ):
    ref[index] = value
