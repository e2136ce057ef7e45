"""Reads a compiled program's cycles, traffic and collectives from its text.

XLA for TPUs writes its estimate of cycles beside each operation, and the memory
space of an array into its layout. Bodies of loops count as often as they run,
which `Compiled.cost_analysis` does not do. These are estimates of a static
model: nothing has been measured.
"""

import collections
import math
import re
from typing import NamedTuple

OPERATION = re.compile(
  r"^ +(?P<root>ROOT )?%(?P<name>[\w.-]+) = "
  r"(?P<shape>.*?) (?P<kind>[a-z][\w-]*)\((?P<rest>.*)$"
)
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
WHILE = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONSTANT = re.compile(r"^s32\[\]")
CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")

# Estimates near 2^61 mean that the compiler does not know.
UNKNOWN = 2**60

ALL_REDUCE = "all-reduce"
OTHER_COLLECTIVES = (
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)

# Operations that move nothing, or whose "-start" is counted instead.
_FREE = frozenset(
  (
    "parameter constant tuple get-tuple-element bitcast while after-all "
    "copy-done slice-done async-done all-reduce-done partition-id replica-id"
  ).split()
)


class Operation(NamedTuple):
  """An operation: one line of a computation."""

  name: str
  shape: str
  kind: str
  rest: str
  is_root: bool

  @property
  def operands(self) -> list[str]:
    """Names of the operands."""
    depth, names = 1, []
    for part in re.findall(r"[()]|%[\w.-]+", self.rest):
      depth += {"(": 1, ")": -1}.get(part, 0)
      if not depth:
        break
      names += [part[1:]] if part[0] == "%" else []
    return names


class Cost(NamedTuple):
  """Sums over a program; the body of a loop counts once for each iteration.

  Attributes:
    cycles: the compiler's estimate; 0 where it gives none (on GPUs).
    unknown: number of operations that the compiler says it cannot estimate.
    traffic: bytes to and from the device's memory, padding included, without
      arrays in VMEM. An estimate: each operation is taken to read its operands
      and to write its result once.
    all_reduces: number of these operations in the text, each counted once.
    other_collectives: the same for all other collectives.
  """

  cycles: int
  unknown: int
  traffic: int
  all_reduces: int
  other_collectives: int


def cost_of(text: str) -> Cost:
  """Computes the costs of a compiled program from its text.

  Args:
    text: `compiled.as_text()`.

  Returns:
    A `Cost`.

  Example:
    >>> cost_of('''
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %y = f32[8]{0} copy(%x), backend_config={"estimated_cycles":"7"}
    ... }
    ... ''')
    Cost(cycles=7, unknown=0, traffic=64, all_reduces=0, other_collectives=0)
  """
  program, entry = _parse(text)
  totals = collections.Counter()
  _add(program, entry, 1, totals)
  kinds = collections.Counter(
    operation.kind.removesuffix("-start")
    for operations in program.values()
    for operation in operations
  )
  return Cost(
    totals["cycles"],
    totals["unknown"],
    totals["traffic"],
    kinds[ALL_REDUCE],
    sum(kinds[kind] for kind in OTHER_COLLECTIVES),
  )


def _parse(text: str) -> tuple[dict[str, list[Operation]], str]:
  """Returns the operations of each computation, and the entry's name."""
  program, entry, current = {}, None, []
  for line in text.splitlines():
    if head := COMPUTATION.match(line):
      current = program.setdefault(head["name"], [])
      entry = head["name"] if head["entry"] else entry
    elif found := OPERATION.match(line):
      name, shape, kind, rest = found.group("name", "shape", "kind", "rest")
      current.append(Operation(name, shape, kind, rest, bool(found["root"])))
  if entry is None:
    raise ValueError("text must be a compiled program, got one without ENTRY.")
  return program, entry


def _add(program, name: str, times: int, totals: collections.Counter) -> None:
  """Adds the costs of a computation that runs `times` times."""
  shapes = {operation.name: operation.shape for operation in program[name]}
  for operation in program[name]:
    if found := CYCLES.search(operation.rest):
      known = int(found[1]) < UNKNOWN
      totals["cycles"] += times * int(found[1]) * known
      totals["unknown"] += not known
    totals["traffic"] += times * _traffic(program, shapes, operation)
    if operation.kind == "while":
      condition, body = WHILE.search(operation.rest).groups()
      trips = _trips(program, operation, condition)
      _add(program, body, times * trips, totals)
    elif operation.kind == "call":
      _add(program, CALLED.search(operation.rest)[1], times, totals)


def _trips(program, operation: Operation, condition: str) -> int:
  """The loop's number of iterations, annotated or by a bound in its condition.

  1 if the text has neither.
  """
  if found := TRIPS.search(operation.rest):
    return int(found[1])
  bounds = [
    int(o.rest.split(")")[0])
    for o in program[condition]
    if o.kind == "constant" and CONSTANT.match(o.shape)
  ]
  return max(bounds, default=1)


def _traffic(program, shapes, operation: Operation) -> int:
  """Bytes that one operation reads and writes."""
  kind = operation.kind
  if kind in _FREE:
    return 0
  operands = [shapes.get(name, "") for name in operation.operands]
  if kind in ("copy-start", "slice-start", "async-start"):
    # The shape is a tuple: destination, source, and others.
    to = ARRAY.search(operation.shape)
    moved = _size(to, anywhere=True)
    ends = [to, ARRAY.search(operands[0])] if operands else [to]
    return sum(moved for end in ends if _size(end))
  if kind == "dynamic-slice":
    return _bytes(operation.shape) + min(
      _bytes(operands[0]), _bytes(operation.shape, anywhere=True)
    )
  if kind == "dynamic-update-slice":
    return _bytes(operands[1]) + min(
      _bytes(operation.shape), _bytes(operands[1], anywhere=True)
    )
  if kind != "fusion":
    return _bytes(operation.shape) + sum(map(_bytes, operands))
  inside = program[CALLED.search(operation.rest)[1]]
  total = 0
  for parameter in (o for o in inside if o.kind == "parameter"):
    whole = _bytes(operands[int(parameter.rest.split(")")[0])])
    total += _read(program, inside, parameter.name, whole)
  by_name = {o.name: o for o in inside}
  root = next(o for o in inside if o.is_root)
  results = root.operands if root.kind == "tuple" else [root.name]
  arrays = list(ARRAY.finditer(operation.shape))
  if len(results) != len(arrays):  # one operation with several results
    return total + _bytes(operation.shape)
  for name, array in zip(results, arrays, strict=True):
    whole, update = _size(array), _updated(program, by_name, name)
    total += whole if update is None else min(whole, update)
  return total


def _read(program, inside: list[Operation], name: str, whole: int) -> int:
  """Bytes that a fusion reads of an array; where it slices, only the slice."""
  total = 0
  for user in inside:
    for position, operand in enumerate(user.operands):
      if operand != name:
        continue
      if user.kind == "bitcast":
        total += _read(program, inside, user.name, whole)
      elif user.kind == "dynamic-slice" and position == 0:
        total += _bytes(user.shape, anywhere=True)
      elif user.kind == "fusion":
        inner = program[CALLED.search(user.rest)[1]]
        parameter = next(
          o
          for o in inner
          if o.kind == "parameter" and int(o.rest.split(")")[0]) == position
        )
        total += _read(program, inner, parameter.name, whole)
      elif user.kind != "dynamic-update-slice" or position > 0:
        total += whole
  return min(whole, total)


def _updated(program, by_name: dict[str, Operation], name: str) -> int | None:
  """Bytes that a fusion writes in place; None if it writes the whole array."""
  operation = by_name[name]
  if operation.kind == "bitcast":
    return _updated(program, by_name, operation.operands[0])
  if operation.kind == "fusion":
    inner = {o.name: o for o in program[CALLED.search(operation.rest)[1]]}
    root = next(o.name for o in inner.values() if o.is_root)
    return _updated(program, inner, root)
  if operation.kind == "dynamic-update-slice":
    return _bytes(by_name[operation.operands[1]].shape, anywhere=True)
  return None


def _bytes(shape: str, *, anywhere: bool = False) -> int:
  """Bytes of all arrays of a shape; `anywhere` includes arrays in VMEM."""
  return sum(_size(a, anywhere=anywhere) for a in ARRAY.finditer(shape))


def _size(array: re.Match, *, anywhere: bool = False) -> int:
  """Bytes of one array with the padding of its tiles; 0 for arrays in VMEM."""
  dtype, sizes, order, tiling = array.groups()
  if not anywhere and re.search(r"S\([1-9]\d*\)", tiling or ""):
    return 0
  sizes = [int(size) for size in sizes.split(",") if size]
  minor_first = [sizes[int(axis)] for axis in (order or "").split(",") if axis]
  if len(minor_first) != len(sizes):
    minor_first = sizes[::-1]
  tile = re.search(r"T\(([\d,]+)\)", tiling or "")
  tile = [int(size) for size in tile[1].split(",")][::-1] if tile else []
  for axis, size in enumerate(tile[: len(minor_first)]):
    minor_first[axis] = -(-minor_first[axis] // size) * size
  return math.ceil(math.prod(minor_first) * _bits(dtype) / 8)


def _bits(dtype: str) -> int:
  """Bits of one number; 0 for types without a size, such as tokens."""
  if dtype == "pred":
    return 8
  found = re.search(r"\d+", dtype)
  return int(found[0]) if found else 0
