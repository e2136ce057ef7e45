"""Foreign pickles: what is read, and that nothing in them is run."""

import builtins
import collections
import os
import pathlib
import pickle
import struct
import sys
import tracemalloc

import numpy as np
import pytest

import spectraformer_jax
from spectraformer_jax.data.formats import pickles

PROTOCOLS = range(6)


def load(path):
  """The value in a small file."""
  return pickles.load(path, max_bytes=2**30)


@pytest.fixture
def write(tmp_path):
  def write(content):
    path = tmp_path / "x.pickle"
    path.write_bytes(content)
    return path

  return write


def same(one, two):
  """Equality of values with arrays in them."""
  if isinstance(one, np.ndarray):
    # As in numpy, numbers are read in the byte order of the machine.
    assert one.dtype.newbyteorder("=") == two.dtype.newbyteorder("=")
    np.testing.assert_array_equal(one, two)
  elif isinstance(one, dict):
    assert one.keys() == two.keys()
    for key in one:
      same(one[key], two[key])
  elif isinstance(one, (list, tuple)):
    assert type(one) is type(two) and len(one) == len(two)
    for a, b in zip(one, two, strict=True):
      same(a, b)
  else:
    assert one == two


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_plain_values_and_arrays(write, protocol):
  grid = np.arange(12, dtype=np.int32).reshape(3, 4)
  value = {
    "none": [None, True, False, 1, -5, 2**40, 2**70, 1.5, "text é", ()],
    "pair": (1, (2, 3)),
    "int32": grid,
    "big endian": grid.astype(">i8"),
    "fortran": np.asfortranarray(grid),
    "bytes": np.arange(256, dtype=np.uint8),
    "half": np.float16([0.5]),
    "flags": np.array([True, False]),
    "again": grid,
    7: [grid[0], {"label": 3}],
  }
  same(value, load(write(pickle.dumps(value, protocol=protocol))))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_scalars_become_numbers(write, protocol):
  value = [np.int32(-3), np.int64(4), np.float32(0.5), np.uint8(200)]
  read = load(write(pickle.dumps(value, protocol=protocol)))
  assert read == [-3, 4, 0.5, 200]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_module_names_of_numpy_1(write, protocol):
  content = pickle.dumps(np.arange(3), protocol=protocol)
  old = content.replace(b"numpy._core.", b"numpy.core.")
  if protocol >= 4:  # names carry their length
    name = "numpy._core.numeric" if protocol == 5 else "numpy._core.multiarray"
    long, short = (
      bytes([len(text)]) + text.encode()
      for text in (name, name.replace("_core", "core"))
    )
    old = content.replace(long, short)
    start = old.index(b"\x95") + 1
    size = struct.pack("<Q", len(old) - start - 8)
    old = old[:start] + size + old[start + 8 :]
  assert old != content
  same(np.arange(3), load(write(old)))


def test_reads_what_python_2_writes(write):
  # {'data': array([[1, 2]], uint8), 'labels': [6]}, protocol 2.
  content = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
    b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01K\x02\x86"
    b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ"
    b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x02tb"
    b"U\x06labelsq\x08]q\x09K\x06au."
  )
  read = load(write(content))
  same(read, {b"data": np.array([[1, 2]], np.uint8), b"labels": [6]})


class Reduce:
  """Pickles as a call of anything."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


class Attributes:
  """Pickles as an instance with a state."""

  def __init__(self):
    self.x = 1


def flag():
  """Where a hostile file would leave its mark."""
  return pathlib.Path(os.environ["HOSTILE_FLAG"])


HOSTILE = {
  "os.system": lambda: Reduce(os.system, f"touch {flag()}"),
  "eval": lambda: Reduce(eval, f"open({str(flag())!r}, 'w')"),
  "exec": lambda: Reduce(exec, f"open({str(flag())!r}, 'w')"),
  "open": lambda: Reduce(builtins.open, str(flag()), "w"),
  "getattr": lambda: Reduce(getattr, "text", "upper"),
  "path": lambda: Reduce(pathlib.Path.touch, flag()),
  "class": Attributes,
  "ordered dict": lambda: collections.OrderedDict(a=1),
  "numpy object array": lambda: np.array([Reduce(os.system, "true")], object),
  "numpy load": lambda: Reduce(np.load, str(flag())),
  "structured": lambda: np.zeros(1, [("a", "i4")]),
  "set": lambda: {1},
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(
  write, tmp_path, monkeypatch, name, nested, protocol
):
  mark = tmp_path / "mark"
  monkeypatch.setenv("HOSTILE_FLAG", str(mark))
  value = HOSTILE[name]()
  if nested:
    value = [{"input_ids_0": np.arange(3), "label": [(value,)]}]
  path = write(pickle.dumps(value, protocol=protocol))
  with pytest.raises(ValueError, match="x.pickle is refused at") as caught:
    load(path)
  assert "\n" not in str(caught.value)
  assert not mark.exists()


TOUCH = b"cposix\nsystem\n(S'touch MARK'\ntR."
HAND_MADE = {
  "global": TOUCH,
  "builtins": b"c__builtin__\neval\n(S'1'\ntR.",
  "nt": b"cnt\nsystem\n(S'dir'\ntR.",
  "inst": b"(S'touch MARK'\nios\nsystem\n.",
  "obj": b"(cos\nsystem\nS'touch MARK'\no.",
  "newobj": b"\x80\x02cos\nsystem\nU\x01x\x85\x81.",
  "newobj_ex": b"\x80\x04cos\nsystem\n)}\x92.",
  "dotted": b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__class__.x\x93.",
  "dotted module": b"\x80\x04\x8c\x08numpy.os\x8c\x06system\x93.",
  "dotted global": b"cnumpy\nndarray.__subclasses__\n)R.",
  "dotted encode": b"c_codecs\nencode.__globals__\n.",
  "numpy testing": b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n}tR.",
  "module no text": b"\x80\x04]\x8c\x01x\x93.",
  "extension": b"\x80\x02\x82\x01.",
  "persistent": b"Pos.system\n.",
  "persistent 2": b"\x80\x02U\x01xQ.",
  "buffer": b"\x80\x05\x97.",
  "calls a type": b"cnumpy\nndarray\n(I1\ntR.",
  "calls a value": b"\x80\x02K\x01)R.",
  "state of a value": b"\x80\x02}}b.",
  "state of a function": b"c_codecs\nencode\n}b.",
  "encode a list": b"\x80\x02c_codecs\nencode\n]U\x06latin1\x86R.",
  "encode as utf-7": b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aU\x05utf-7\x86R.",
  "subclass of array": (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\0\x85"
    b"U\x01b\x87R."
  ),
  "object scalar": (
    b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02O8K\0K\x01"
    b"\x87RU\x08AAAAAAAA\x86R."
  ),
  "object flags": (
    b"\x80\x02cnumpy\ndtype\nU\x02i8K\0K\x01\x87R(K\x04U\x01<U\x01xNNK\0K\0K\0"
    b"tb."
  ),
  "list as key": b"\x80\x02}]K\x01s.",
  "tuple as key": b"\x80\x02}K\x01\x85K\x01s.",
  "append to a dict": b"\x80\x02}K\x01a.",
  "underflow": b"\x80\x02R.",
  "no mark": b"\x80\x02e.",
  "memo": b"\x80\x02h\x07.",
  "left over": b"\x80\x02K\x01K\x02.",
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made_files_are_refused(write, tmp_path, name):
  mark = tmp_path / "mark"
  content = HAND_MADE[name].replace(b"MARK", str(mark).encode())
  modules = set(sys.modules)
  with pytest.raises(ValueError, match="x.pickle is refused at") as caught:
    load(write(content))
  assert "\n" not in str(caught.value)
  assert not mark.exists()
  assert set(sys.modules) == modules


def array_pickle(shape, raw):
  """An int32 array of hand-made shape and bytes."""
  return (
    b"\x80\x04cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85"
    b"C\x01b\x87R(K\x01" + shape + b"cnumpy\ndtype\n\x8c\x02i4K\0K\x01\x87R"
    b"\x89B" + struct.pack("<I", len(raw)) + raw + b"tb."
  )


@pytest.mark.parametrize(
  ("shape", "raw"),
  [
    (b"K\x03\x85", bytes(8)),
    (b"K\x01\x85", bytes(8)),
    (b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86", bytes(4)),
    (b"K\x02\x85", bytes(7)),
    (b"\x8c\x01aK\x7f\x86", bytes(8)),
    (b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", bytes(8)),
  ],
)
def test_size_of_an_array_must_be_that_of_its_bytes(write, shape, raw):
  same(
    np.zeros(2, np.int32),
    load(write(array_pickle(b"K\x02\x85", raw=bytes(8)))),
  )
  with pytest.raises(ValueError, match="is refused"):
    load(write(array_pickle(shape, raw)))


@pytest.mark.parametrize("keep", [0, 1, 2, 50, -3, -1])
def test_incomplete_files_are_refused(write, keep):
  content = pickle.dumps([np.arange(100)], protocol=4)
  with pytest.raises(ValueError, match="is no complete pickle file") as caught:
    load(write(content[:keep]))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "content",
  [b"\xff" * 9, b"PK\3\4", b"I" + b"9" * 9999 + b"\n.", b"\x8e" + b"\xff" * 8],
)
def test_files_of_another_kind_are_refused(write, content):
  with pytest.raises(ValueError, match="is no complete pickle file|is refused"):
    load(write(content))


def test_nested_references_take_no_time(write):
  # Each list holds the one before twice: 2**60 elements, were they copied.
  content = b"\x80\x02]q\0" + b"".join(
    b"]q" + bytes([i]) + b"(h" + bytes([i - 1]) + b"h" + bytes([i - 1]) + b"e"
    for i in range(1, 60)
  )
  with pytest.raises(ValueError, match="is refused"):
    load(write(content + b"."))
  for use in (b"\x86\x93.", b"c_codecs\nencode\nh\x3bU\x06latin1\x86R."):
    with pytest.raises(ValueError, match="is refused"):
      load(write(content + use))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_items_of_a_long_list(write, protocol):
  # More than the thousand that a pickler writes at once.
  items = [
    {"input_ids_0": np.full(5, i, np.int32), "label": np.int64(i)}
    for i in range(2500)
  ]
  read = load(write(pickle.dumps(items, protocol=protocol)))
  for i, item in enumerate(read):
    assert item["label"] == i and item["input_ids_0"].tolist() == [i] * 5
  assert len(read) == 2500


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.quick_every(2)
def test_memory_of_a_large_file(write, protocol):
  items = [
    {"input_ids_0": np.full(4000, i, np.int32), "label": np.int32(i % 2)}
    for i in range(3500)
  ]
  path = write(pickle.dumps(items, protocol=protocol))
  del items
  tracemalloc.start()
  count = len(load(path))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # The file has 56 MB; protocol 2 holds the bytes of arrays as text as well.
  limit = 130e6 if protocol == 2 else 70e6
  assert count == 3500 and path.stat().st_size > 55e6 and peak < limit


def test_a_file_that_is_too_large_is_refused(write):
  path = write(pickle.dumps([1, 2]))
  with pytest.raises(ValueError, match="must have at most 10 bytes, got 20."):
    pickles.load(path, max_bytes=10)


def test_an_array_may_be_shared_by_distant_items(write):
  shared = np.arange(10)
  items = [{"a": shared}, *({"b": i} for i in range(2000)), {"a": shared}]
  read = load(write(pickle.dumps(items)))
  assert len(read) == 2002 and read[-1]["a"] is read[0]["a"]


def test_pickles_are_read_here_alone():
  for path in pathlib.Path(spectraformer_jax.data.__file__).parent.rglob(
    "*.py"
  ):
    text = path.read_text()
    assert ("Unpickler" in text) == (path.name == "pickles.py"), path
    for word in ("pickle.load", "allow_pickle=True"):
      assert word not in text, (path, word)
    for call in text.split("np.load(")[1:]:
      assert "allow_pickle=False" in call.split(")\n")[0], path.name
