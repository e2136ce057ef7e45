"""How many positions a loop handles at a time: pure functions of sizes."""

from typing import NamedTuple


class Sizes(NamedTuple):
  """The fastest sizes on one platform, in positions.

  Attributes:
    chunk: of a causal chunk. Its masked product costs C (F + V) a token and its
      state F V, so that C near V is cheapest on a CPU; matrix units want more
      rows.
    step: of all rows (examples times heads) in a causal step, which has at
      least one chunk. Smaller steps cost as much to launch as to compute; on a
      CPU the features of larger ones leave the cache.
    stride: between two states that are saved for the backward pass, at least
      one step. States in between are computed again. A state has F (V + 1)
      numbers; query, key and value of one position have 2 H + V.
    block: of all rows in a block where every key is seen.
    is_by_row: a block is a part of one row where a row has `block` positions.
      XLA for CPUs runs a batch of products on one thread, and one long product
      on all threads.
  """

  chunk: int
  step: int
  stride: int
  block: int
  is_by_row: bool = False


SIZES = {
  # chunk: the cost above. step: "causal steps of 2048 positions of all rows on
  # a CPU too", docs/decisions/07. stride: "states kept every 256 positions",
  # 07. block: "blocks of 2048 positions", and by rows: "blocks of 2048 to 4095
  # positions of one head", both docs/decisions/05.
  "cpu": Sizes(chunk=64, step=2048, stride=256, block=2048, is_by_row=True),
  # step, block: "blocks of 16,384 positions of all rows on accelerators", 05,
  # and "several chunks in a causal step", 07. stride: the H100 in "states kept
  # every 256 positions", 07. Compiled, never timed.
  "gpu": Sizes(chunk=128, step=16384, stride=2048, block=16384),
  # chunk: "chunks of 128" is slower, docs/decisions/README. step, block: "steps
  # of 32,768 positions, blocks too", 05. stride: "every state between causal
  # steps kept", 07. Estimated by the compiler for v5e (benchmarks/aot.csv).
  "tpu": Sizes(chunk=256, step=32768, stride=256, block=32768),
}


class CausalPlan(NamedTuple):
  """A causal pass: strides of steps of chunks.

  Attributes:
    chunk_size: positions of a chunk, C.
    chunks_per_step: chunks that one step computes at once, L.
    steps_per_stride: steps between two saved states.
    num_strides: strides; symbolic where the length is.
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
  """A pass over independent blocks.

  Attributes:
    block_size: positions of a block.
    num_blocks: blocks of a row; symbolic where the length is.
    is_by_row: a block has one head of one example, not all heads of all.
  """

  block_size: int
  num_blocks: int
  is_by_row: bool


def is_known(*sizes: int) -> bool:
  """Whether no size is symbolic, as those of exported programs may be."""
  return all(isinstance(size, int) for size in sizes)


def plan_causal(
  length: int,
  num_rows: int,
  chunk_size: int | None,
  *,
  is_packed: bool,
  platform: str,
) -> CausalPlan:
  """Plans a causal pass.

  Args:
    length: T.
    num_rows: examples times heads.
    chunk_size: positions of a chunk, one chunk a step; None: the fastest sizes.
    is_packed: rows have segments. A step is one chunk then: where segments
      meet, a state belongs to the last one.
    platform: a key of `SIZES`; another one plans as a GPU.
  """
  best = _sizes(platform)
  size = best.chunk if chunk_size is None else chunk_size
  most = 1
  if chunk_size is None and not is_packed and is_known(length, num_rows):
    most = max(1, best.step // (num_rows * size))
  if not is_known(length):
    steps_per_stride = max(1, best.stride // size)
    num_strides = _ceil(length, steps_per_stride * size)
    return CausalPlan(size, 1, steps_per_stride, num_strides)
  size = min(size, length)
  num_chunks = _ceil(length, size)
  num_steps = _ceil(num_chunks, most)
  chunks_per_step = _ceil(num_chunks, num_steps)
  num_strides = _ceil(
    num_steps, max(1, best.stride // (chunks_per_step * size))
  )
  return CausalPlan(
    size, chunks_per_step, _ceil(num_steps, num_strides), num_strides
  )


def plan_blocks(
  length: int,
  num_rows: int,
  chunk_size: int | None,
  *,
  num_devices: int,
  platform: str,
) -> BlockPlan:
  """Plans a pass over blocks.

  Args:
    length: T or S.
    num_rows: examples times heads.
    chunk_size: positions of a block of all rows; None: the fastest sizes.
    num_devices: rows may be divided over several, and then none can be looked
      up by its number.
    platform: a key of `SIZES`; another one plans as a GPU.
  """
  best = _sizes(platform)
  if not is_known(length, num_rows):
    size = chunk_size or best.chunk
    return BlockPlan(size, _ceil(length, size), False)
  is_by_row = best.is_by_row and chunk_size is None and num_devices == 1
  if is_by_row and length >= best.block:
    # Equal blocks of at least that size, so that little is padded.
    size = _ceil(length, length // best.block)
    return BlockPlan(size, _ceil(length, size), True)
  size = chunk_size or max(best.chunk, best.block // num_rows)
  size = min(size, length)
  return BlockPlan(size, _ceil(length, size), False)


def _sizes(platform: str) -> Sizes:
  return SIZES.get(platform, SIZES["gpu"])


def _ceil(a: int, b: int) -> int:
  """Returns a / b, rounded up."""
  return -(-a // b)
