"""Padding sequences, and reading and writing them block by block."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import leaves
from spectraformer_jax.linear_attention.inputs import Inputs, KeyArrays
from spectraformer_jax.linear_attention.varying import varying_like
from spectraformer_jax.linear_attention.xla.plan import is_known
from spectraformer_jax.typing import Array, PyTree

Tree = TypeVar("Tree", bound=PyTree)


class Place(NamedTuple):
  """Where a block starts."""

  example: Array | int
  head: Array | int
  position: Array | int


class Keys(NamedTuple):
  """The keys of one block.

  Attributes:
    key: ``[B, N, C, H]``.
    value: ``[B, N, C, V]``.
    key_mask: ``[B, N or 1, C, 1]`` bool; None: all are visible.
    position: of the first key.
  """

  key: Array
  value: Array
  key_mask: Array | None
  position: Array


class CausalBlock(NamedTuple):
  """Queries and keys of the same positions.

  Attributes:
    query: ``[B, N, G, C, H]``.
    keys: see `Keys`.
    segment: segment ids ``[B, C]``, not decreasing; None: there are no
      segments.
  """

  query: Array
  keys: Keys
  segment: Array | None


def pad(x: Array, length: int, mode: str = "constant") -> Array:
  """Pads axis 1 to a length."""
  padding = length - x.shape[1]
  if is_known(padding) and not padding:
    return x
  widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths, mode=mode)


def pad_keys(keys: KeyArrays, length: int) -> KeyArrays:
  """Pads the arrays of keys to a length, and masks the padding."""
  key, value, key_mask = keys
  if key_mask is None and length != key.shape[1]:
    key_mask = jnp.ones(key.shape[:2], bool)
  mask = None if key_mask is None else pad(key_mask, length)
  return pad(key, length), pad(value, length), mask


def pad_inputs(inputs: Inputs, length: int) -> Inputs:
  """Pads all arrays to a length, masks the padding, and flattens queries."""
  query, ids = pad(flat(inputs.query), length), inputs.segment_ids
  # Padding belongs to the last segment: it is masked in any case.
  ids = jax.tree.map(lambda ids: pad(ids, length, mode="edge"), ids)
  return Inputs(query, *pad_keys(inputs.keys, length), ids)


def flat(query: Array) -> Array:
  """``[B, T, N, G, H] -> [B, T, N G, H]``, the layout for loops.

  With an axis of size 1, as G often is, XLA for CPUs copies the whole array
  (docs/decisions/01-blocks-in-place.md). To be dropped once a program without
  it needs no more temporary memory.
  """
  return query.reshape(*query.shape[:2], -1, query.shape[-1])


def empty_like(
  x: Array, depth: int | None = None, dtype: jnp.dtype | None = None
) -> Array:
  """Returns zeros that a loop overwrites, or adds to, block by block.

  `jax.lax.empty` would not write zeros first, but under `vmap` its result
  counts as mapped, which `jax.jacfwd` does not allow.

  Args:
    x: gives shape and dtype.
    depth: another size of the last axis.
    dtype: another dtype.
  """
  shape = x.shape if depth is None else (*x.shape[:-1], depth)
  return varying_like(jnp.zeros(shape, dtype or x.dtype), x)


class Blocks(NamedTuple):
  """Arrays of B examples and N heads, cut into blocks of positions.

  Attributes:
    batch: B.
    heads: N, those of keys.
    size: positions of a block, C.
    num_blocks: number of blocks of a sequence; symbolic if the length is.
    is_per_head: whether a block has one head of one example; otherwise it has
      all heads of all examples.
    is_reversed: whether blocks, and positions in a block, go from the last
      position to the first.
    key_start: index of the first position's key in the arrays of keys.
  """

  batch: int
  heads: int
  size: int
  num_blocks: int
  is_per_head: bool = False
  is_reversed: bool = False
  key_start: int = 0

  @property
  def length(self) -> int:
    """Positions of a sequence with its padding."""
    return self.num_blocks * self.size

  def indices(self) -> Array:
    """Returns the indices of all blocks."""
    num_heads = self.batch * self.heads if self.is_per_head else 1
    return jnp.arange(num_heads * self.num_blocks)

  def place(self, index: Array) -> Place:
    """Returns where block `index` starts; the position varies fastest."""
    if self.is_reversed:
      index = self.num_blocks - 1 - index
    if not self.is_per_head:
      return Place(0, 0, index * self.size)
    index, block = jnp.divmod(index, self.num_blocks)
    example, head = jnp.divmod(index, self.heads)
    return Place(example, head, block * self.size)

  def of_keys(self, place: Place) -> Place:
    """Returns the place of a block in the arrays of keys."""
    return place._replace(position=place.position + self.key_start)

  def take(self, x: Array, place: Place) -> Array:
    """Reads a block of ``[B, S, N (G), .]``, ``[B, S, N]`` or ``[B, S]``."""
    block = jax.lax.dynamic_slice(x, *self._of_array(x, place))
    return jnp.flip(block, axis=1) if self.is_reversed else block

  def take_keys(self, keys: KeyArrays, place: Place, start: Array) -> Keys:
    """Reads the keys of a block; `start` is the position of the first key."""
    key, value, key_mask = keys
    position, place = start + place.position, self.of_keys(place)
    if key_mask is not None:
      mask = self.take(key_mask, place)
      mask = mask[..., None] if mask.ndim == 2 else mask
      key_mask = jnp.swapaxes(mask, 1, 2)[..., None]
    return Keys(
      jnp.swapaxes(self.take(key, place), 1, 2),
      jnp.swapaxes(self.take(value, place), 1, 2),
      key_mask,
      position,
    )

  def take_queries(self, query: Array, place: Place) -> Array:
    """Reads a block of ``[B, T, N G, H]``, as ``[B, N, G, C, H]``."""
    block = self.take(query, place)
    heads = self._examples_and_heads()[1]
    block = block.reshape(*block.shape[:2], heads, -1, block.shape[-1])
    return jnp.moveaxis(block, 1, 3)

  def take_causal(
    self, inputs: Inputs, place: Place, start: Array
  ) -> CausalBlock:
    """Reads queries, keys and segment ids of a block; see `take_keys`."""
    segment_ids = inputs.segment_ids
    return CausalBlock(
      self.take_queries(inputs.query, place),
      self.take_keys(inputs.keys, place, start),
      None if segment_ids is None else self.take(segment_ids[0], place),
    )

  def write(self, whole: Array, block: Array, place: Place) -> Array:
    """Writes ``[B, N, (G,) C, V]`` into ``[B, T, N (G), V]``.

    If `whole` is in a loop's carry, the block is written in place, in the
    caller's own layout. Blocks that the loop stacks would need a second buffer
    and a transposition.
    """
    start, size = self._of_array(whole, place)
    block = self._in_array(block, size, whole.dtype)
    return jax.lax.dynamic_update_slice(whole, block, start)

  def add(self, whole: Array, block: Array, place: Place) -> Array:
    """Adds ``[B, N, (G,) C, V]`` to a block of ``[B, T, N (G), V]``."""
    start, size = self._of_array(whole, place)
    old = jax.lax.dynamic_slice(whole, start, size)
    block = self._in_array(block, size, whole.dtype)
    return jax.lax.dynamic_update_slice(whole, old + block, start)

  def stacked(self, x: Array, chunk_size: int) -> Array:
    """Arranges one number per query as a loop stacks those of its blocks.

    Args:
      x: ``[B, T, N G]``.
      chunk_size: positions of a chunk, C; a block has L chunks.

    Returns:
      ``[blocks, B, N, L, G C]``; per head ``[blocks, 1, 1, L, G C]``.
    """
    x = pad(x, self.length)
    if self.is_reversed:
      x = jnp.flip(x, axis=1)
    shape = self.num_blocks, self.size // chunk_size, chunk_size
    x = x.reshape(self.batch, *shape, self.heads, -1)
    order = (0, 4, 1, 2, 5, 3) if self.is_per_head else (1, 0, 4, 2, 5, 3)
    x = jnp.transpose(x, order)
    examples, heads = self._examples_and_heads()
    return x.reshape(-1, examples, heads, shape[1], x.shape[4] * x.shape[5])

  def take_heads(self, tree: Tree, place: Place) -> Tree:
    """Reads what a tree holds for the examples and heads of a block.

    Args:
      tree: leaves have leading axes ``[B or 1, N or 1]``; scalars stay as they
        are.
      place: where the block starts.
    """
    if not self.is_per_head:
      return tree

    def take_leaf(leaf: Array) -> Array:
      if not leaf.ndim:
        return leaf
      return jax.lax.dynamic_slice(leaf, *self._of_leaf(leaf, place))

    return jax.tree.map(take_leaf, tree)

  def write_heads(self, whole: Tree, of_heads: Tree, place: Place) -> Tree:
    """Writes into the whole tree what `take_heads` reads."""
    if not self.is_per_head:
      return of_heads

    def write_leaf(leaf: Array, part: Array) -> Array:
      if not leaf.ndim:
        return part
      start, _ = self._of_leaf(leaf, place)
      return jax.lax.dynamic_update_slice(leaf, part, start)

    return jax.tree.map(write_leaf, whole, of_heads)

  def add_to_heads(self, whole: Tree, of_heads: Tree, place: Place) -> Tree:
    """Adds to what the tree holds for the examples and heads of a block."""
    added = leaves.tree_add(self.take_heads(whole, place), of_heads)
    return self.write_heads(whole, added, place)

  def _examples_and_heads(self) -> tuple[int, int]:
    """Returns the numbers of examples and heads of a block."""
    return (1, 1) if self.is_per_head else (self.batch, self.heads)

  def _in_array(self, block: Array, size: list[int], dtype: jnp.dtype) -> Array:
    """Arranges ``[B, N, (G,) C, V]`` as a block lies in an array."""
    block = jnp.moveaxis(block, -2, 1).astype(dtype).reshape(size)
    return jnp.flip(block, axis=1) if self.is_reversed else block

  def _of_array(
    self, x: Array, place: Place
  ) -> tuple[list[Array | int], list[int]]:
    """Returns where a block of an array starts, and its shape."""
    examples, heads = self._examples_and_heads()
    start, size = [place.example, place.position], [examples, self.size]
    if x.ndim > 2:
      groups = x.shape[2] // self.heads
      start += [place.head * groups] + [0] * (x.ndim - 3)
      size += [heads * groups, *x.shape[3:]]
    return start, size

  def _of_leaf(
    self, leaf: Array, place: Place
  ) -> tuple[list[Array | int], tuple[int, ...]]:
    """Returns start and shape of one head of ``[B or 1, N or 1, ...]``."""
    start = [
      0 if size == 1 else at
      for size, at in zip(leaf.shape[:2], place[:2], strict=True)
    ]
    return start + [0] * (leaf.ndim - 2), (1, 1, *leaf.shape[2:])
