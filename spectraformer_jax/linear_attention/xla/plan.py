"""Plans how many positions a loop handles at once, from sizes alone."""

from typing import NamedTuple


class Sizes(NamedTuple):
  """The fastest sizes on one platform.

  Attributes:
    chunk: positions of a causal chunk, C. For each token the masked product
      costs C (F + V) and the state costs F V, so chunks shorter than V save
      little, and longer ones cost more; matrix units need more rows.
    step: positions of a causal step, counted over all heads of all examples; a
      step has at least one chunk. Smaller steps cost as much to launch as to
      compute; on a CPU the features of larger steps do not fit into the cache.
    stride: positions between two states that are saved for the backward pass,
      at least one step. States in between are computed again. For comparison: a
      state has F (V + 1) numbers, and query, key and value of one position have
      2 H + V.
    block: positions of a block in a pass that is not causal, counted likewise.
    is_per_head: whether each head of each example has blocks of its own if it
      has at least `block` positions: XLA for CPUs runs a batch of products on
      one thread, but one long product on all threads.
  """

  chunk: int
  step: int
  stride: int
  block: int
  is_per_head: bool = False


SIZES = {
  # Each size was chosen by a row of a table in docs/decisions. A comment gives
  # the file and the first words of that row. chunk: the cost above. step: 07,
  # "causal steps of 2048 positions". stride: 07, "states kept every 256
  # positions". block: 05, "blocks of 2048 positions". is_per_head: 05, "blocks
  # of 2048 to 4095 positions".
  "cpu": Sizes(chunk=64, step=2048, stride=256, block=2048, is_per_head=True),
  # Compiled, never timed. step: 07, "several chunks in a causal step". stride:
  # 07, H100 in "states kept every 256 positions". block: 05, "blocks of 16,384
  # positions".
  "gpu": Sizes(chunk=128, step=16384, stride=2048, block=16384),
  # Estimated by the compiler for v5e. chunk: README, "chunks of 128". step,
  # block: 05, "steps of 32,768 positions". stride: 07, "every state between
  # causal steps kept".
  "tpu": Sizes(chunk=256, step=32768, stride=256, block=32768),
}


class CausalPlan(NamedTuple):
  """The sizes of a causal pass: strides consist of steps, steps of chunks.

  Attributes:
    chunk_size: positions of a chunk, C.
    chunks_per_step: chunks that one step computes at once, L.
    steps_per_stride: steps between two saved states.
    num_strides: number of strides; symbolic if the length is.
  """

  chunk_size: int
  chunks_per_step: int
  steps_per_stride: int
  num_strides: int

  @property
  def step_size(self) -> int:
    """Positions of a step."""
    return self.chunks_per_step * self.chunk_size

  @property
  def num_steps(self) -> int:
    """Steps of the pass."""
    return self.num_strides * self.steps_per_stride


class BlockPlan(NamedTuple):
  """The sizes of a pass over independent blocks.

  Attributes:
    block_size: positions of a block.
    num_blocks: number of blocks of a sequence; symbolic if the length is.
    is_per_head: whether a block has one head of one example; otherwise it has
      all heads of all examples.
  """

  block_size: int
  num_blocks: int
  is_per_head: bool


def is_known(*sizes: int) -> bool:
  """Whether no size is symbolic; sizes of exported programs may be."""
  return all(isinstance(size, int) for size in sizes)


def plan_causal(
  length: int,
  num_heads: int,
  chunk_size: int | None,
  *,
  is_packed: bool,
  platform: str,
) -> CausalPlan:
  """Plans a causal pass.

  Args:
    length: T.
    num_heads: heads of all examples together, B N.
    chunk_size: positions of a chunk; a step is one chunk then. None: the
      fastest sizes.
    is_packed: whether there are segments. A step is one chunk then, because the
      state after a step holds one segment only, the last one of the step.
    platform: a key of `SIZES`; any other name gets the sizes of a GPU.
  """
  best = _sizes(platform)
  size = best.chunk if chunk_size is None else chunk_size
  if not is_known(length):
    # Sizes of blocks must be numbers: only the number of strides is symbolic.
    steps_per_stride = max(1, best.stride // size)
    num_strides = _ceil(length, steps_per_stride * size)
    return CausalPlan(size, 1, steps_per_stride, num_strides)
  max_chunks_per_step = 1
  if chunk_size is None and not is_packed and is_known(num_heads):
    max_chunks_per_step = max(1, best.step // (num_heads * size))
  size = min(size, length)
  num_chunks = _ceil(length, size)
  num_steps = _ceil(num_chunks, max_chunks_per_step)
  chunks_per_step = _ceil(num_chunks, num_steps)
  num_strides = _ceil(
    num_steps, max(1, best.stride // (chunks_per_step * size))
  )
  return CausalPlan(
    size, chunks_per_step, _ceil(num_steps, num_strides), num_strides
  )


def plan_blocks(
  length: int,
  num_heads: int,
  chunk_size: int | None,
  *,
  num_devices: int,
  platform: str,
) -> BlockPlan:
  """Plans a pass over blocks.

  Args:
    length: T or S.
    num_heads: heads of all examples together, B N.
    chunk_size: positions of a block, which then has all heads of all examples;
      None: the fastest sizes.
    num_devices: number of devices. With more than one, heads and examples may
      be divided over devices, so a loop cannot pick one of them by its number.
    platform: a key of `SIZES`; any other name gets the sizes of a GPU.
  """
  best = _sizes(platform)
  if not is_known(length, num_heads):
    size = chunk_size or best.chunk
    return BlockPlan(size, _ceil(length, size), False)
  is_per_head = best.is_per_head and chunk_size is None and num_devices == 1
  if is_per_head and length >= best.block:
    # Equal blocks of at least `best.block` positions, so that little is padded.
    size = _ceil(length, length // best.block)
    return BlockPlan(size, _ceil(length, size), True)
  size = chunk_size or max(best.chunk, best.block // num_heads)
  size = min(size, length)
  return BlockPlan(size, _ceil(length, size), False)


def _sizes(platform: str) -> Sizes:
  return SIZES.get(platform, SIZES["gpu"])


def _ceil(a: int, b: int) -> int:
  """Returns a / b, rounded up."""
  return -(-a // b)
