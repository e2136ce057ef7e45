"""Pickle files of other programs, read without running any of them.

The standard unpickler imports and calls what the file names. Here the opcodes
are followed one by one, and a file gets plain values (None, numbers, strings,
bytes, tuples, lists, dicts) and numpy arrays and scalars of numbers. Whatever
else it asks for is refused. The few names that stand for numpy's own functions
only select code of this module; nothing is imported, called or built by name.

Covers what pickle protocols 0 to 5 of Python 2 and 3, and numpy 1 and 2, write
for such values. Strings of Python 2 come out as bytes.

Time and memory are in proportion to the file, whatever it holds: a value may
refer to another a billion times over, so none is walked through, copied, hashed
or printed that may be nested or long, and what is held at once is limited. The
standard unpickler with a list of allowed names would hold a whole file, of up
to 5 GB here, at once.
"""

import enum
import math
import pathlib
import pickletools
import re
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from spectraformer_jax.data.find import first_line, open_plain

ERRORS = (ArithmeticError, LookupError, MemoryError, TypeError, ValueError)

_SHARED_TEXT = 64
_MAX_NAME = 100  # bytes of a name of a function, a type or a byte order
_MAX_PIECE = 2**26  # bytes of one string: a batch of CIFAR-10 has 30 MB
_MAX_BITS = 2**15  # of an integer
# What may be held at once; an iterator lets go of what it has handed on.
_MAX_HELD = 2**28  # bytes of strings and arrays
_MAX_STEPS = 2**20  # opcodes
_MAX_SHARED = 2**20  # short strings that may come again


class _Name(enum.Enum):
  """What a file may refer to."""

  RECONSTRUCT = enum.auto()
  FROMBUFFER = enum.auto()
  SCALAR = enum.auto()
  NDARRAY = enum.auto()
  DTYPE = enum.auto()
  ENCODE = enum.auto()


_NAMES = {
  "numpy.core.multiarray _reconstruct": _Name.RECONSTRUCT,
  "numpy._core.multiarray _reconstruct": _Name.RECONSTRUCT,
  "numpy.core.multiarray scalar": _Name.SCALAR,
  "numpy._core.multiarray scalar": _Name.SCALAR,
  "numpy.core.numeric _frombuffer": _Name.FROMBUFFER,
  "numpy._core.numeric _frombuffer": _Name.FROMBUFFER,
  "numpy ndarray": _Name.NDARRAY,
  "numpy dtype": _Name.DTYPE,
  "_codecs encode": _Name.ENCODE,
}


def load(path: pathlib.Path) -> Any:
  """The value in a pickle file.

  Raises:
    ValueError: if the file is incomplete or damaged, or asks for anything but
      plain values and arrays of numbers.

  Example:
    >>> import pickle, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "x.pickle"
    >>> _ = path.write_bytes(pickle.dumps({"label": np.int32(3)}))
    >>> load(path)
    {'label': 3}
  """
  machine = _Machine(streaming=False)
  for _ in _run(path, machine):
    pass
  return machine.result


def iterate(path: pathlib.Path) -> Iterator[Any]:
  """The items of the list in a pickle file, without holding all of them.

  Raises:
    ValueError: as :func:`load`, or if the value is no list, or if an item
      shares an array with one that came long before it.
  """
  machine = _Machine(streaming=True)
  yield from _run(path, machine)
  if not isinstance(machine.result, list):
    raise ValueError(
      f"{path} must hold a list, got {type(machine.result).__name__}."
    )


def _run(path: pathlib.Path, machine: "_Machine") -> Iterator[Any]:
  """Feeds a file to a machine; yields what it lets go."""
  position = 0
  with open_plain(path) as file:
    opcodes = pickletools.genops(_Bounded(file))
    while True:
      try:
        opcode, argument, position = next(opcodes)
      except StopIteration:
        return
      except ERRORS as error:
        raise ValueError(
          f"{path} is no complete pickle file ({first_line(error)}, after byte "
          f"{position}); it is cut off, damaged or another kind of file."
        ) from None
      try:
        machine.step(opcode.name, argument)
      except ERRORS as error:
        raise ValueError(
          f"{path} is refused at byte {position}: {first_line(error)}"
        ) from None
      if machine.items:
        yield from machine.items
        machine.forget()


class _Bounded:
  """A file that never reads a long string into memory."""

  def __init__(self, file: BinaryIO):
    self.file = file
    self.tell = file.tell

  def read(self, size: int) -> bytes:
    if size > _MAX_PIECE:
      raise ValueError(f"it announces {size} bytes, more than {_MAX_PIECE}")
    return self.file.read(size)

  def readline(self) -> bytes:
    line = self.file.readline(_MAX_PIECE)
    if len(line) == _MAX_PIECE:
      raise ValueError(f"it has a line of more than {_MAX_PIECE} bytes")
    return line


class _Dtype:
  """A number type while it is being read."""

  def __init__(self, code: str):
    self.code = code
    self.order = "="

  def numpy(self) -> np.dtype:
    return np.dtype(self.code).newbyteorder(self.order)


class _Box:
  """An array that has been announced and not filled yet."""

  memo_key: int | None = None


class _Machine:
  """The stack machine that a pickle file programs."""

  def __init__(self, streaming: bool):
    self.streaming = streaming
    self.result: Any = None
    self.items: list[Any] = []  # of the outermost list, when streaming
    self.stack: list[Any] = []
    self.outer: list[list[Any]] = []  # the stacks below open marks
    self.memo: dict[int, Any] = {}
    self.memoized = 0
    self.passing: set[int] = set()  # memo entries that die with their item
    self.held = 0
    self.steps = 0

  def hold(self, value: Any) -> None:
    """Counts a value in; ValueError if there are too many or too large ones."""
    self.held += sys.getsizeof(value)
    self.steps += 1
    if self.held > _MAX_HELD or self.steps > _MAX_STEPS:
      raise ValueError(
        f"it holds more than {_MAX_HELD} bytes or {_MAX_STEPS} values at once."
      )

  def step(self, name: str, argument: Any) -> None:
    """One opcode."""
    self.hold(argument)
    if type(argument) is int and argument.bit_length() > _MAX_BITS:
      raise ValueError(f"it holds a number of {argument.bit_length()} bits.")
    if name in _CONSTANTS:
      self.stack.append(argument)
    elif name in _TEXTS:
      self.stack.append(argument.encode("latin-1"))
    elif name in _VALUES:
      self.stack.append(_VALUES[name]())
    elif name in _TUPLES:
      size = _TUPLES[name]
      members = [self.stack.pop() for _ in range(size)]
      self.stack.append(tuple(reversed(members)))
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
      self.remember(argument)
    elif name in ("GET", "BINGET", "LONG_BINGET"):
      self.stack.append(self.recall(argument))
    elif name in _METHODS:
      getattr(self, _METHODS[name])()
    elif name == "GLOBAL":
      self.stack.append(_lookup(argument))
    elif name not in ("PROTO", "FRAME"):
      raise ValueError(f"it uses {name}, which plain values do not need.")

  def mark(self) -> None:
    self.outer.append(self.stack)
    self.stack = []

  def since_mark(self) -> list[Any]:
    members, self.stack = self.stack, self.outer.pop()
    return members

  def tuple_(self) -> None:
    members = self.since_mark()
    self.stack.append(tuple(members))

  def list_(self) -> None:
    members = self.since_mark()
    self.stack.append(members)

  def dict_(self) -> None:
    members = self.since_mark()
    self.stack.append(_pairs(members))

  def append(self) -> None:
    self.extend([self.stack.pop()])

  def appends(self) -> None:
    self.extend(self.since_mark())

  def extend(self, members: list[Any]) -> None:
    target = self.stack[-1]
    if not isinstance(target, list):
      raise ValueError("it appends to something that is no list.")
    outermost = not self.outer and len(self.stack) == 1
    (self.items if self.streaming and outermost else target).extend(members)

  def setitem(self) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    self.update([key, value])

  def setitems(self) -> None:
    self.update(self.since_mark())

  def update(self, members: list[Any]) -> None:
    target = self.stack[-1]
    if not isinstance(target, dict):
      raise ValueError("it sets an item of something that is no dict.")
    target.update(_pairs(members))

  def memoize(self) -> None:
    self.remember(self.memoized)

  def remember(self, key: int) -> None:
    if not 0 <= key < 2**32:
      raise ValueError("it gives an object a number beyond 32 bits.")
    value = self.stack[-1]
    self.memo[key] = value
    self.memoized += 1
    if isinstance(value, _Box):
      value.memo_key = key
    # Field names, types and the like are shared by all items of a list.
    small = isinstance(value, (bytes, str)) and len(value) <= _SHARED_TEXT
    if not small and not isinstance(value, (_Name, _Dtype)):
      self.passing.add(key)
    elif len(self.memo) - len(self.passing) > _MAX_SHARED:
      raise ValueError(f"it shares more than {_MAX_SHARED} strings.")

  def recall(self, key: int) -> Any:
    if key not in self.memo:
      raise ValueError(f"object {key} is not there, or no longer.")
    return self.memo[key]

  def forget(self) -> None:
    """Lets go of items handed on, and of what only they refer to."""
    self.items = []
    for key in self.passing:
      if self.memo[key] is not self.stack[0]:  # the outermost list
        del self.memo[key]
    self.passing = set()
    self.held = self.steps = 0

  def global_(self) -> None:
    name, module = self.stack.pop(), self.stack.pop()
    self.stack.append(_lookup(f"{_text(module)} {_text(name)}"))

  def reduce(self) -> None:
    arguments, name = self.stack.pop(), self.stack.pop()
    if not isinstance(name, _Name) or not isinstance(arguments, tuple):
      raise ValueError("it calls something that is no function.")
    if len(arguments) > 5:
      raise ValueError(f"it calls a function with {len(arguments)} arguments.")
    made = _call(name, *arguments)
    if isinstance(made, bytes):
      self.hold(made)
    self.stack.append(made)

  def build(self) -> None:
    state, target = self.stack.pop(), self.stack[-1]
    if not isinstance(state, tuple) or len(state) > 9:
      raise ValueError("it changes an object by something that is no state.")
    if isinstance(target, _Dtype):
      _, target.order, *rest = state
      target.order = _text(target.order)
      if rest[:3] != [None] * 3 or target.order not in ("<", ">", "|", "="):
        raise ValueError("its arrays are not of plain numbers.")
    elif isinstance(target, _Box):
      _, shape, dtype, fortran, raw = state
      array = _array(raw, dtype, shape, "F" if fortran else "C")
      self.stack[-1] = array
      if target.memo_key is not None:
        self.memo[target.memo_key] = array
    else:
      raise ValueError("it changes an object that is no array.")

  def stop(self) -> None:
    self.result = self.stack.pop()
    if self.stack or self.outer:
      raise ValueError("values are left over at its end.")


_CONSTANTS = {
  *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
  *("FLOAT", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
  *("BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # byte strings of Python 2
_VALUES = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_LIST": list,
  "EMPTY_TUPLE": tuple,
  "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_METHODS = {
  "MARK": "mark",
  "TUPLE": "tuple_",
  "LIST": "list_",
  "DICT": "dict_",
  "APPEND": "append",
  "APPENDS": "appends",
  "SETITEM": "setitem",
  "SETITEMS": "setitems",
  "MEMOIZE": "memoize",
  "STACK_GLOBAL": "global_",
  "REDUCE": "reduce",
  "BUILD": "build",
  "STOP": "stop",
}


def _lookup(name: str) -> _Name:
  """The one thing that a name may mean; ValueError for any other name."""
  if name not in _NAMES:
    shown = name.replace(" ", ".", 1)[:60]
    raise ValueError(
      f"it asks for {shown!r}, and only numpy arrays and plain values are read."
    )
  return _NAMES[name]


def _call(name: _Name, *arguments: Any) -> Any:
  """What numpy's function of that name would have given."""
  if name is _Name.ENCODE:
    text, encoding = arguments
    if encoding != "latin1" or not isinstance(text, str):
      raise ValueError("it encodes text other than as 'latin1'.")
    return text.encode("latin-1")
  if name is _Name.DTYPE:
    code = _text(arguments[0])
    if not re.fullmatch("[iu][1248]|f[248]|b1", code):
      raise ValueError(f"it holds numbers of type {code[:20]!r}.")
    return _Dtype(code)
  if name is _Name.RECONSTRUCT:
    if arguments[0] is not _Name.NDARRAY:
      raise ValueError("it asks for a kind of array that is not numpy's own.")
    return _Box()
  if name is _Name.FROMBUFFER:
    raw, dtype, shape, order = arguments[:4]
    if type(order) is not str or order not in ("C", "F") or len(arguments) > 4:
      raise ValueError("it holds an array of unknown layout.")
    return _array(raw, dtype, shape, order)
  if name is _Name.SCALAR:
    dtype, raw = arguments
    return _array(raw, dtype, (), "C").item()
  raise ValueError("it calls a type.")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
  """An array of numbers, whose size must be that of its bytes."""
  if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
    raise ValueError("its arrays are not of plain numbers.")
  if not isinstance(shape, tuple) or len(shape) > 8:
    raise ValueError("the shape of an array is no short tuple.")
  if not all(type(n) is int and 0 <= n < 2**40 for n in shape):
    raise ValueError("the shape of an array is no tuple of sizes.")
  numbers = np.frombuffer(raw, dtype.numpy())
  if math.prod(shape) != len(numbers):
    raise ValueError(f"{len(numbers)} numbers are no array of its shape.")
  return numbers.reshape(shape, order=order)


def _pairs(members: list[Any]) -> dict[Any, Any]:
  """Keys and values in turn as a dict."""
  if len(members) % 2:
    raise ValueError("a dict lacks its last value.")
  # Hashing nested tuples may take for ever, and long integers may be made to
  # have one hash.
  for key in members[::2]:
    if type(key) not in (str, bytes, int):
      raise ValueError("a key of a dict is neither text nor integer.")
    if type(key) is int and key.bit_length() > 32:
      raise ValueError(f"a key of a dict has {key.bit_length()} bits.")
  return dict(zip(members[::2], members[1::2], strict=True))


def _text(text: Any) -> str:
  """A short text that may have come as bytes."""
  if not isinstance(text, (bytes, str)) or len(text) > _MAX_NAME:
    raise ValueError("it has something else where a name belongs.")
  return text.decode("ascii") if isinstance(text, bytes) else text
