"""Draws ListOps expressions by the grammar of Long Range Arena, fast.

The grammar: a node is an operator with probability 1/4 and a digit otherwise;
at the depth limit every node is a digit; the root has depth 1. All operators
are equally likely, and so are all digits, and all numbers of arguments from 2
to 10. A digit is one token, an operator two (its name and its closing bracket),
and an expression is kept when its length lies strictly between two bounds.

Many trees grow together, one depth at a time, so that numpy does the work. A
level is an array of the nodes of one depth. In it the nodes of a tree, and the
arguments of an operator, are neighbours; children follow in the order of their
parents. Everything else is then a segmented sum, minimum, maximum or sort over
neighbours.

Source: Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree
Learning", 2018; Tay et al., "Long Range Arena", 2021, section 2.2.1.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from spectraformer_jax.data.formats.listops_text import CLOSE, MAX, MED, MIN, SM

VERSION = 1
"""Part of the token cache's key; increase it if a seed's sequences change."""

MIN_ARGUMENTS, MAX_ARGUMENTS = 2, 10

_ROOTS = 1024  # trees grown together: a level fits the processor's cache

# Maps a uniform number below 160 to a node: 12 of the numbers give each digit
# and 10 each operator, so the four operators together have exactly 1/4.
_NODES = np.repeat(
  np.arange(1, SM + 1, dtype=np.uint8), [12] * 10 + [10] * (SM - MIN + 1)
)


class Expressions(NamedTuple):
  """Holds a batch of expressions, one after the other.

  Attributes:
    tokens: ids with closing brackets, ``[sum(lengths)]`` uint8.
    lengths: tokens of each expression, ``[count]`` int32.
    values: value of each expression, 0 to 9, ``[count]`` uint8.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  values: np.ndarray


class _Level(NamedTuple):
  """Holds the nodes of one depth: ids, and each operator's argument count."""

  ids: np.ndarray
  arity: np.ndarray


def sample(
  rng: np.random.Generator, *, min_len: int, max_len: int, max_depth: int
) -> Iterator[Expressions]:
  """Yields batches of expressions without end.

  Args:
    rng: source of all randomness.
    min_len: exclusive lower bound of the length, at least 1.
    max_len: exclusive upper bound of the length.
    max_depth: depth at which all nodes are digits; the root has depth 1.

  Yields:
    :class:`Expressions` with ``min_len < length < max_len``; their count varies
    and may be 0, and expressions may repeat.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> stream = sample(rng, min_len=500, max_len=2000, max_depth=10)
    >>> batch = next(stream)
    >>> int(batch.lengths.min()) > 500, int(batch.lengths.max()) < 2000
    (True, True)
  """
  while True:
    yield _linearise(_grow(rng, min_len, max_len, max_depth))


def _grow(
  rng: np.random.Generator, min_len: int, max_len: int, max_depth: int
) -> list[_Level]:
  """Grows `_ROOTS` trees; returns the levels of those of accepted length."""
  # A lone digit has length 1 and is never kept, so every root is an operator.
  ids = rng.integers(MIN, SM + 1, _ROOTS, dtype=np.uint8)
  nodes = np.ones(_ROOTS, np.int32)
  length = np.zeros(_ROOTS, np.int32)
  alive = np.ones(_ROOTS, bool)
  levels = []
  for depth in range(1, max_depth + 1):
    ends = np.cumsum(nodes)
    operators = _segment_sums(ids >= MIN, ends)
    operator_ends = np.cumsum(operators)
    arity = rng.integers(
      MIN_ARGUMENTS, MAX_ARGUMENTS + 1, operator_ends[-1], dtype=np.uint8
    )
    children = _segment_sums(arity, operator_ends)
    length += nodes + operators
    # Drops trees that will be too long: each child adds at least one token.
    alive &= length + children < max_len
    levels.append((ids, nodes, arity, operators))
    nodes = np.where(alive, children, 0)
    pending = int(nodes.sum())
    if pending == 0:
      break
    if depth + 1 < max_depth:
      ids = _NODES[rng.integers(0, len(_NODES), pending, dtype=np.uint8)]
    else:
      ids = rng.integers(1, 11, pending, dtype=np.uint8)
  keep = alive & (length > min_len)
  return [
    _Level(ids[np.repeat(keep, nodes)], arity[np.repeat(keep, operators)])
    for ids, nodes, arity, operators in levels
  ]


def _linearise(levels: list[_Level]) -> Expressions:
  """Writes trees as tokens, and computes the value of each.

  Computes the value and the size (tokens of the subtree) of each node
  bottom-up, then the position of its first token top-down.
  """
  sizes: list[np.ndarray] = []  # the deepest level first
  value = np.empty(0, np.uint8)
  for level in reversed(levels):
    size = np.ones(len(level.ids), np.int32)
    below, value = value, level.ids - np.uint8(1)
    if len(level.arity):
      operator = np.flatnonzero(level.ids >= MIN)
      starts = _starts(level.arity)
      size[operator] = 2 + np.add.reduceat(sizes[-1], starts)
      value[operator] = _apply(level.ids[operator], below, starts, level.arity)
    sizes.append(size)
  sizes.reverse()

  lengths = sizes[0]
  tokens = np.empty(int(lengths.sum()), np.uint8)
  position = _starts(lengths)
  for depth, level in enumerate(levels):
    tokens[position] = level.ids
    if len(level.arity) == 0:
      break
    operator = np.flatnonzero(level.ids >= MIN)
    opening = position[operator]
    tokens[opening + sizes[depth][operator] - 1] = CLOSE
    # A child comes after its operator's token and the siblings before it.
    before = _starts(sizes[depth + 1])
    first = before[_starts(level.arity)]
    position = before + np.repeat(opening + 1 - first, level.arity)
  return Expressions(tokens, lengths, value)


def _apply(
  operators: np.ndarray,
  arguments: np.ndarray,
  starts: np.ndarray,
  arity: np.ndarray,
) -> np.ndarray:
  """Returns the value of each operator; the sum of 10 digits fits a uint8."""
  value = np.add.reduceat(arguments, starts, dtype=np.uint8) % np.uint8(10)
  lowest = np.minimum.reduceat(arguments, starts)
  highest = np.maximum.reduceat(arguments, starts)
  np.copyto(value, lowest, where=operators == MIN)
  np.copyto(value, highest, where=operators == MAX)
  median = np.flatnonzero(operators == MED)
  value[median] = _medians(arguments, starts[median], arity[median])
  return value


def _medians(
  arguments: np.ndarray, starts: np.ndarray, arity: np.ndarray
) -> np.ndarray:
  """Returns the median of each segment, rounded down, by one sort over all."""
  arity = arity.astype(np.int32)
  first = _starts(arity)
  index = np.arange(arity.sum(), dtype=np.int32)
  index += np.repeat(starts - first, arity)
  segment = np.repeat(np.arange(len(arity), dtype=np.int32), arity)
  # A digit takes the low 4 bits, so each segment is sorted by itself.
  ordered = np.sort(segment * 16 + arguments[index])
  lower = ordered[first + (arity - 1) // 2] % 16
  upper = ordered[first + arity // 2] % 16
  return (lower + upper) // 2


def _starts(counts: np.ndarray) -> np.ndarray:
  """Returns where segments of the sizes `counts` start, int32."""
  ends = np.cumsum(counts, dtype=np.int32)
  return ends - counts


def _segment_sums(numbers: np.ndarray, ends: np.ndarray) -> np.ndarray:
  """Returns the sums of segments that end at `ends`, and may be empty."""
  total = np.zeros(len(numbers) + 1, np.int32)
  np.cumsum(numbers, dtype=np.int32, out=total[1:])
  return np.diff(total[ends], prepend=np.int32(0))
