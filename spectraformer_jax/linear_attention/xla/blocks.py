"""Sequences in blocks of positions: sizes, padding, reading and writing one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import leaves
from spectraformer_jax.linear_attention.varying import varying_like
from spectraformer_jax.typing import Array, PyTree


class Sizes(NamedTuple):
  """What is best on a backend.

  Attributes:
    chunk: positions of a causal chunk. Its masked product costs C (F + V) a
      token and the state F V, so C near V is cheapest on a CPU; matrix units
      want more rows.
    step: positions of all rows (examples and heads) in a causal step, which
      takes one chunk or more. Below, launching its programs costs as much as
      they do; above, features leave a CPU's cache.
    stride: positions between two states that are kept for the backward pass,
      one step at least. Those between are made again. A state has F (V + 1)
      numbers, query, key and value of one position 2 H + V.
    block: positions of all rows in a block of what sees every key: features of
      a block should stay in the cache.
    by_row: such a block is of one row where that is long enough. XLA for CPUs
      runs the products of several rows on one thread, those of a long one on
      all.
  """

  chunk: int
  step: int
  stride: int
  block: int
  by_row: bool = False


SIZES = {
  "cpu": Sizes(chunk=64, step=2048, stride=256, block=2048, by_row=True),
  "gpu": Sizes(chunk=128, step=16384, stride=2048, block=16384),
  "tpu": Sizes(chunk=256, step=32768, stride=256, block=32768),
}


def sizes() -> Sizes:
  """Those of the backend in use."""
  return SIZES.get(jax.default_backend(), SIZES["gpu"])


class Place(NamedTuple):
  """Where a block starts."""

  example: Array | int
  head: Array | int
  position: Array | int


def is_known(*sizes) -> bool:
  """Whether sizes are numbers; those of an exported program may be symbols."""
  return all(isinstance(size, int) for size in sizes)


def step_size(chunk: int | None, key: Array) -> tuple[int, int]:
  """Positions in a causal chunk, and chunks in a step: one if it is asked."""
  if chunk:
    return chunk, 1
  best = sizes()
  if not is_known(*key.shape):
    return best.chunk, 1
  rows = key.shape[0] * key.shape[2]
  return best.chunk, max(1, best.step // (rows * best.chunk))


def pad(x: Array | None, length: int, mode: str = "constant"):
  """Pads axis 1 to a length; None stays None."""
  if x is None:
    return None
  padding = length - x.shape[1]
  if is_known(padding) and not padding:
    return x
  widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths, mode=mode)


def flat(query: Array) -> Array:
  """``[B, T, N, G, H] -> [B, T, N G, H]``, as loops should take it.

  For the layout of an axis of size 1, like G, XLA would copy all of it.
  """
  return query.reshape(*query.shape[:2], -1, query.shape[-1])


def empty_like(x: Array, depth: int | None = None, dtype=None) -> Array:
  """Zeros to be written over block by block.

  `jax.lax.empty` would save a write, but seems to depend on what `vmap` maps
  over, which `jax.jacfwd` does not allow.

  Args:
    x: its shape and dtype.
    depth: another last axis.
    dtype: another dtype.
  """
  shape = x.shape if depth is None else (*x.shape[:-1], depth)
  return varying_like(jnp.zeros(shape, dtype or x.dtype), x)


class Cut(NamedTuple):
  """Arrays of B examples, N heads and some positions, cut into blocks.

  Attributes:
    batch: B.
    heads: N, those of keys.
    positions: of a block.
    count: blocks of a row.
    by_row: a block has one head of one example, instead of all.
  """

  batch: int
  heads: int
  positions: int
  count: int
  by_row: bool = False

  @property
  def length(self) -> int:
    """Positions of a row with its padding."""
    return self.count * self.positions

  def indices(self) -> Array:
    """The numbers of all blocks."""
    rows = self.batch * self.heads if self.by_row else 1
    return jnp.arange(rows * self.count)

  def place(self, index: Array) -> Place:
    """Of block `index`: positions first, then heads, then examples."""
    if not self.by_row:
      return Place(0, 0, index * self.positions)
    row, block = jnp.divmod(index, self.count)
    return Place(*jnp.divmod(row, self.heads), block * self.positions)

  def take(self, x: Array, place: Place) -> Array:
    """A block of ``[B, S, N (G), .]`` or of ``[B, S]``."""
    start, size = self._of_array(x, place)
    return jax.lax.dynamic_slice(x, start, size)

  def keys(self, key, value, keep, place: Place, start):
    """Keys and values ``[B, N, C, .]`` of a block, its position and mask."""
    block_key, block_value = (
      jnp.swapaxes(self.take(x, place), 1, 2) for x in (key, value)
    )
    if keep is not None:
      keep = self.take(keep, place)[:, None, :, None]
    return block_key, block_value, start + place.position, keep

  def queries(self, query: Array, place: Place) -> Array:
    """A block of ``[B, T, N G, H]``, as ``[B, N, G, C, H]``."""
    block = self.take(query, place)
    shape = (*block.shape[:2], self._rows()[1], -1, block.shape[-1])
    return jnp.moveaxis(block.reshape(shape), 1, 3)

  def write(self, whole: Array, block: Array, place: Place) -> Array:
    """``[B, T, N (G), V]`` with ``[B, N, (G,) C, V]`` in its place.

    In a loop's carry the block is written in place, in the caller's own
    layout: stacked blocks would need a second buffer and a transposition.
    """
    start, size = self._of_array(whole, place)
    block = jnp.moveaxis(block, -2, 1).astype(whole.dtype).reshape(size)
    return jax.lax.dynamic_update_slice(whole, block, start)

  def rows(self, tree: PyTree, place: Place) -> PyTree:
    """What belongs to a block's examples and heads.

    Leaves lead with ``[B, N]``, where either may be 1: shared by all. Scalars
    stay as they are.
    """
    if not self.by_row:
      return tree

    def one(leaf):
      if not leaf.ndim:
        return leaf
      start, size = self._of_rows(leaf, place)
      return jax.lax.dynamic_slice(leaf, start, size)

    return jax.tree.map(one, tree)

  def write_rows(self, whole: PyTree, rows: PyTree, place: Place) -> PyTree:
    """A tree with those of a block in their place."""
    if not self.by_row:
      return rows

    def one(leaf, part):
      if not leaf.ndim:
        return part
      start, _ = self._of_rows(leaf, place)
      return jax.lax.dynamic_update_slice(leaf, part, start)

    return jax.tree.map(one, whole, rows)

  def add_to_rows(self, whole: PyTree, rows: PyTree, place: Place) -> PyTree:
    """A tree with what a block contributes added in its place."""
    added = leaves.tree_add(self.rows(whole, place), rows)
    return self.write_rows(whole, added, place)

  def _rows(self) -> tuple[int, int]:
    """Examples and heads of a block."""
    return (1, 1) if self.by_row else (self.batch, self.heads)

  def _of_array(self, x, place):
    """Where a block of an array with positions starts, and its shape."""
    examples, heads = self._rows()
    start, size = [place.example, place.position], [examples, self.positions]
    if x.ndim > 2:
      groups = x.shape[2] // self.heads
      start += [place.head * groups] + [0] * (x.ndim - 3)
      size += [heads * groups, *x.shape[3:]]
    return start, size

  def _of_rows(self, leaf, place):
    """Where one row of what leads with examples and heads starts; its shape."""
    shared = [size == 1 for size in leaf.shape[:2]]
    start = [
      0 if one else at for one, at in zip(shared, place[:2], strict=True)
    ]
    return start + [0] * (leaf.ndim - 2), (1, 1, *leaf.shape[2:])


def best_cut(chunk: int | None, shape: tuple[int, ...]) -> Cut:
  """Of ``[B, S, N, ...]``: all rows of what is asked, or what is best."""
  batch, length, heads = shape[:3]
  best = sizes()
  # Over several devices rows are divided: none may be looked up by its number.
  is_alone = jax.device_count() == 1
  known = is_known(*shape)
  by_row = not chunk and best.by_row and is_alone and known
  by_row = by_row and length >= best.block
  if by_row:
    # At least that many positions, evenly, so that little is padded.
    positions = -(-length // (length // best.block))
  elif known:
    positions = chunk or max(best.chunk, best.block // (batch * heads))
    positions = min(positions, length)
  else:
    positions = chunk or best.chunk
  return Cut(batch, heads, positions, -(-length // positions), by_row)
