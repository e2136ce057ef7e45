"""Reads pickle files of other programs without running anything in them.

`pickle.Unpickler` builds the values: None, numbers, strings, bytes, tuples,
lists, dicts, and numpy arrays and scalars of numbers. A file may only name the
functions that numpy writes for arrays. A function of this module replaces each
of them, so a file can neither import nor call anything else.

A scan of the opcodes comes first, since opcodes alone can exhaust memory or
time: hashing a dict key that is a tuple of references to tuples takes time
exponential in the size of the file, and an object numbered 2**31 needs a memo
of 2**32 entries. For files that pass the scan, time and memory are proportional
to the size of the file, which is held in memory as a whole.

Reads what pickle protocols 0 to 5 of Python 2 and 3, and numpy 1 and 2, write
for such values. Strings of Python 2 become bytes.
"""

import math
import mmap
import pathlib
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import IO, Any, cast

import numpy as np

from spectraformer_jax.data.find import first_line, open_plain

_MAX_INT_BITS = 2**15  # bits of an integer
_MAX_NAME = 100  # bytes of the name of a type or a byte order
# A file may have `_MIN_STEPS` opcodes, and one more per `_BYTES_PER_STEP`
# bytes. An opcode makes a value of at most 64 bytes plus its content. So the
# values of a small file take 64 MiB, those of a large one twice its size. A
# real file has about 30 opcodes for an array of 1,000 numbers or more.
_MIN_STEPS = 2**20
_BYTES_PER_STEP = 32

_OPCODES = frozenset(
  """
  PROTO FRAME STOP MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
  NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
  BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8
  BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST LIST
  APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM
  SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
  """.split()
)

_ENCODE = "_codecs encode"


def load(path: pathlib.Path, max_bytes: int) -> Any:
  """Returns the value in a pickle file.

  Args:
    path: path of the file.
    max_bytes: largest size of the file. Arrays take as much memory as they
      take in the file, or twice that with protocols below 3.

  Raises:
    ValueError: if the file is too large, incomplete or damaged, or holds
      anything but plain values and arrays of numbers.

  Example:
    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "x.pickle"
    >>> _ = path.write_bytes(pickle.dumps({"label": np.int32(3)}))
    >>> load(path, max_bytes=1000)
    {'label': 3}
  """
  with open_plain(path) as file:
    size = path.stat().st_size
    if size > max_bytes:
      raise ValueError(
        f"{path} must have at most {max_bytes} bytes, got {size}."
      )
    scan, position = _Scan(size), 0
    try:
      content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      stream = cast("IO[bytes]", content)  # it has read, readline and tell
      for opcode, argument, opcode_position in pickletools.genops(stream):
        position = opcode_position or 0
        scan.step(opcode, argument)
    except _RefusedError as error:
      raise ValueError(
        f"{path} is refused at byte {position}: {error}"
      ) from None
    except Exception as error:  # a damaged file raises nearly anything
      raise ValueError(
        f"{path} is no complete pickle file ({first_line(error)}, after byte "
        f"{position}); it is cut off, damaged or another kind of file."
      ) from None
    content.seek(0)
    try:
      return _Unpickler(content, size).load()
    except Exception as error:  # arguments of a call may be anything
      raise ValueError(
        f"{path} is refused at byte {content.tell()}: {first_line(error)}"
      ) from None


class _RefusedError(ValueError):
  """Raised for opcodes that plain values and arrays do not need."""


class _Scan:
  """Simulates the unpickler's stack with kinds of values instead of values.

  A kind is a `StackObject` of pickletools, or `_ENCODE` for that function.
  """

  def __init__(self, size: int) -> None:
    self.max_steps = _MIN_STEPS + size // _BYTES_PER_STEP
    self.steps = 0
    self.stack: list[Any] = []
    self.marks: list[int] = []  # sizes of the stack where it was marked
    self.memo: dict[int, Any] = {}

  def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
    """Simulates one opcode; raises _RefusedError if it must not run."""
    name = opcode.name
    self.steps += 1
    if self.steps > self.max_steps:
      raise _RefusedError(f"it has more than {self.max_steps} opcodes.")
    if name not in _OPCODES:
      raise _RefusedError(f"it uses {name}, which plain values do not need.")
    if name.endswith("PUT") or name == "MEMOIZE":
      self._remember(len(self.memo) if name == "MEMOIZE" else argument)
    elif name.endswith("GET"):
      if argument not in self.memo:
        raise _RefusedError(
          f"it refers to object {argument}, which is missing."
        )
      self.stack.append(self.memo[argument])
    elif name == "MARK":
      self.marks.append(len(self.stack))
    else:
      self._replace(opcode, argument)

  def _remember(self, key: int) -> None:
    # Picklers number objects in order, so no number exceeds that of opcodes.
    if not 0 <= key <= self.steps or not self.stack:
      raise _RefusedError(f"it gives number {key} to object {len(self.memo)}.")
    self.memo[key] = self.stack[-1]

  def _replace(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
    """Pops the values that the opcode takes, and pushes those that it makes."""
    members = []
    if pickletools.stackslice in opcode.stack_before:
      if not self.marks:
        raise _RefusedError(f"it uses {opcode.name} without a mark.")
      start = self.marks.pop()
      members = self.stack[start:]
      del self.stack[start:]
    wanted = [kind for kind in opcode.stack_before if kind not in _MARKED]
    start = len(self.stack) - len(wanted)
    if start < (self.marks[-1] if self.marks else 0):
      raise _RefusedError(f"it uses {opcode.name} with too few values.")
    taken = self.stack[start:]
    del self.stack[start:]
    for kind, found in zip(wanted, taken, strict=True):
      if kind in _CONTAINERS and found is not kind:
        raise _RefusedError(f"it uses {opcode.name} on something else.")
    if opcode.name in ("DICT", "SETITEM", "SETITEMS"):
      keys = taken[1:2] or members[::2]
      if not _KEYS.issuperset(keys):
        raise _RefusedError(
          "a key of a dict is neither text nor a short integer."
        )
    if opcode.name == "STOP" and self.stack:
      raise _RefusedError("values are left over at its end.")
    if opcode.name == "GLOBAL" and argument == _ENCODE:
      self.stack.append(_ENCODE)
    elif opcode.name == "REDUCE" and taken[0] == _ENCODE:
      self.stack.append(pickletools.pybytes)
    elif type(argument) is int and argument.bit_length() > 32:
      if argument.bit_length() > _MAX_INT_BITS:
        raise _RefusedError(
          f"it holds a number of {argument.bit_length()} bits."
        )
      self.stack.append(pickletools.anyobject)
    else:
      self.stack.extend(opcode.stack_after)


_MARKED = (pickletools.markobject, pickletools.stackslice)
_CONTAINERS = (pickletools.pylist, pickletools.pydict)
# Not tuples, which may take exponential time to hash, nor long integers, which
# may all have the same hash.
_KEYS = {
  pickletools.pybytes,
  pickletools.pybytes_or_str,
  pickletools.pyint,
  pickletools.pyinteger_or_bool,
  pickletools.pyunicode,
}


class _Function:
  """A function that a file may call but not modify."""

  def __init__(self, call: Callable[..., Any]) -> None:
    self._call = call

  def __call__(self, *arguments: Any) -> Any:
    return self._call(*arguments)

  def __setstate__(self, state: Any) -> None:
    raise ValueError("it changes an object that is no array.")


class _Dtype:
  """A type of numbers; stands for ``numpy.dtype(code, align, copy)``."""

  def __init__(self, code: Any, align: Any, copy: Any) -> None:
    self.code, self.order = _text(code), "="
    if not re.fullmatch("[iu][1248]|f[248]|b1", self.code):
      raise ValueError(f"it holds numbers of type {self.code[:20]!r}.")

  def __setstate__(self, state: Any) -> None:
    _check_tuple(state, 9)
    _, order, *parts = state
    self.order = _text(order)
    if parts[:3] != [None] * 3 or self.order not in ("<", ">", "|", "="):
      raise ValueError("its arrays are not of plain numbers.")


class _Array(np.ndarray):
  """An array that a file creates empty and then fills by its state."""

  count: Callable[[int], None]

  def __setstate__(self, state: Any) -> None:
    _check_tuple(state, 5)
    _, shape, dtype, fortran, raw = state
    filled = _array(raw, dtype, shape, "F" if fortran else "C")
    self.count(len(raw))  # numpy copies if the byte order is not its own
    state = (1, filled.shape, filled.dtype, bool(fortran), raw)
    super().__setstate__(state)
    del self.count  # each array is filled once


class _Unpickler(pickle.Unpickler):
  """Unpickles with the functions of this module in place of numpy's."""

  def __init__(self, content: mmap.mmap, size: int) -> None:
    super().__init__(content, encoding="bytes")
    # Bytes still free to copy: each byte may be encoded once and copied once.
    self._free = 2 * size

  def find_class(self, module: str, name: str) -> _Function:
    full_name = f"{module} {name}".replace("numpy._core.", "numpy.core.")
    if full_name == "numpy.core.multiarray _reconstruct":
      return _Function(self._reconstruct)
    if full_name == _ENCODE:
      return _Function(self._encode)
    if full_name not in _FUNCTIONS:
      raise ValueError(
        f"it asks for {f'{module}.{name}'[:60]!r}, and only numpy arrays and "
        "plain values are read."
      )
    return _FUNCTIONS[full_name]

  def _count(self, size: int) -> None:
    self._free -= size
    if self._free < 0:
      raise ValueError("it copies its strings again and again.")

  def _encode(self, text: Any, encoding: Any) -> bytes:
    """Returns bytes that Python 3 writes as text in protocols 0 to 2."""
    if encoding != "latin1" or not isinstance(text, str):
      raise ValueError("it encodes text other than as 'latin1'.")
    self._count(len(text))
    return text.encode("latin-1")

  def _reconstruct(self, kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
      raise ValueError("it asks for a kind of array that is not numpy's own.")
    array = np.ndarray.__new__(_Array, 0, np.int8)
    array.count = self._count
    return array


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
  if order not in ("C", "F"):
    raise ValueError("it holds an array of unknown layout.")
  return _array(raw, dtype, shape, order)


def _scalar(dtype: Any, raw: Any) -> Any:
  return _array(raw, dtype, (), "C").item()


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
  """Makes an array of numbers; raises ValueError unless its bytes fit it."""
  if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
    raise ValueError("its arrays are not of plain numbers.")
  _check_tuple(shape, 8)
  if not all(type(n) is int and 0 <= n < 2**40 for n in shape):
    raise ValueError("the shape of an array is no tuple of sizes.")
  numbers = np.frombuffer(raw, np.dtype(dtype.order + dtype.code))
  if math.prod(shape) != len(numbers):
    raise ValueError(f"{len(numbers)} numbers are no array of its shape.")
  return numbers.reshape(shape, order="F" if order == "F" else "C")


def _check_tuple(value: Any, max_length: int) -> None:
  if not isinstance(value, tuple) or len(value) > max_length:
    raise ValueError(f"it needs a tuple of at most {max_length} values.")


def _text(text: Any) -> str:
  """Returns a short text, which may have been pickled as bytes."""
  if not isinstance(text, bytes | str) or len(text) > _MAX_NAME:
    raise ValueError("it has something else where a name belongs.")
  return text.decode("ascii") if isinstance(text, bytes) else text


def _not_callable(*arguments: Any) -> None:
  raise ValueError("it calls a type.")


_NDARRAY = _Function(_not_callable)
_FUNCTIONS = {
  "numpy ndarray": _NDARRAY,
  "numpy dtype": _Function(_Dtype),
  "numpy.core.multiarray scalar": _Function(_scalar),
  "numpy.core.numeric _frombuffer": _Function(_frombuffer),
}
