"""Files that were made to harm: pipes, devices, bombs, code in descriptions."""

import json
import os
import signal
import struct
import sys
import tracemalloc

import numpy as np
import pytest

from spectraformer_jax import data
from spectraformer_jax.data import cache
from spectraformer_jax.data.formats import pickles
from spectraformer_jax.data.readers.reader import check_label
from tests.data import fuzz, made_up


@pytest.fixture(autouse=True)
def in_time():
  """A hang is a failure."""

  def stop(signum, frame):
    pytest.fail("took longer than 20 seconds")

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(20)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def refusal(task, folder, tmp_path, split="train", **options):
  """The message, on one line, that building a split ends in."""
  with pytest.raises(ValueError) as caught:
    data.load(task, split, data_dir=folder, cache_dir=tmp_path / "c", **options)
  message = str(caught.value)
  assert "\n" not in message and str(folder) in message
  return message


# Files that are no files.


def pipe(path):
  os.mkfifo(path)


def zeros(path):
  path.symlink_to("/dev/zero")


def folder(path):
  path.mkdir()


def dangling(path):
  path.symlink_to("nowhere")


def loop(path):
  path.symlink_to(path.name)


ODD = (pipe, zeros, folder, dangling, loop)


def replace(path, make):
  path.unlink()
  make(path)


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("number", [0, 1])  # the checksum reads the ends alone
def test_reviews(tmp_path, make, number):
  top = made_up.write_aclimdb(tmp_path / "aclImdb", count=3)
  replace(top / "test" / "neg" / f"{number}_2.txt", make)
  message = refusal("text", top, tmp_path, "test")
  assert f"{number}_2.txt must be a plain file" in message


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("number", [0, 3])
def test_pictures(tmp_path, make, number):
  top = made_up.write_pathfinder(tmp_path, batches=1, count=5)
  replace(top / "imgs" / "0" / f"sample_{number}.png", make)
  message = refusal("pathfinder", tmp_path, tmp_path)
  assert f"sample_{number}.png" in message
  assert "must be a plain file" in message or "is missing" in message


@pytest.mark.parametrize("make", ODD)
def test_lists(tmp_path, make):
  top = made_up.write_pathfinder(tmp_path, batches=2, count=5)
  replace(top / "metadata" / "0.npy", make)
  assert "0.npy must be a pl" in refusal("pathfinder", tmp_path, tmp_path)


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "meta.json"])
def test_cache_files(tmp_path, make, name):
  fuzz.write_cached(tmp_path)
  path = cache.split_folder(fuzz.TOY, "train", tmp_path) / name
  replace(path, make)
  with pytest.raises(ValueError, match=f"{name} must be a plain.*; delete it"):
    fuzz.read_cached(tmp_path)


@pytest.mark.parametrize("make", ODD)
def test_descriptions(tmp_path, make, caplog):
  make(tmp_path / "dataset_info.json")
  assert "must hold aclImdb" in refusal("text", tmp_path, tmp_path)
  odd = make not in (dangling, loop)
  assert ("dataset_info.json must be a plain file" in caplog.text) == odd


@pytest.mark.parametrize("depth", [10**4, 10**6])
def test_nested_description(tmp_path, depth, caplog):
  (tmp_path / "dataset_info.json").write_text("[" * depth)
  assert "must hold aclImdb" in refusal("text", tmp_path, tmp_path)
  assert "dataset_info.json" in caplog.text


def test_huge_review(tmp_path):
  top = made_up.write_aclimdb(tmp_path / "aclImdb", count=3)
  with open(top / "train" / "pos" / "1_9.txt", "wb") as file:
    file.truncate(2**40)
  tracemalloc.start()
  message = refusal("text", top, tmp_path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert "must not be larger than" in message and peak < 2**25


# Pickles.


def nested(levels=40):
  """A tuple of 2**levels leaves, in a few hundred bytes."""
  value = ()
  for _ in range(levels):
    value = (value, value)
  return value


LABELS = {
  "a tuple": nested,
  "an integer of 1329 bits": lambda: 10**400,
  "'nan'": lambda: float("nan"),
  "'inf'": lambda: float("inf"),
  "'0.5'": lambda: 0.5,
  "'2'": lambda: 2,
  "a list": list,
  "a dict": dict,
  "a NoneType": lambda: None,
  "an array": lambda: np.zeros(2, int),
  "a complex": None,
}


@pytest.mark.parametrize("shown", LABELS)
def test_labels(tmp_path, shown):
  if LABELS[shown] is None:
    with pytest.raises(ValueError, match=f"to 1, got {shown}"):
      check_label(1j, 2, "here")
    return
  ids = made_up.padded([98], 4)
  examples = [{"input_ids_0": ids, "label": LABELS[shown]()}]
  made_up.write_pickles(tmp_path, "lra-text", examples)
  message = refusal("text", tmp_path, tmp_path, val="lra")
  assert "train.pickle example 0: the label must be an integer from" in message
  assert message.endswith(f"to 1, got {shown}.")


@pytest.mark.parametrize(
  "label", [1, 1.0, np.int8(1), np.float32(1), np.array(1), True, "1.0", b"1"]
)
def test_labels_that_are_taken(label):
  assert check_label(label, 2, "here") == 1


@pytest.mark.parametrize(
  "label",
  [b"0_3", b" 3", b"3 ", b"3e0", b"+3", b"-0", b"0x3", "٣", "3\n", "9" * 9999],
)
def test_texts_that_are_no_labels(label):
  with pytest.raises(
    ValueError, match="here: the label must .* got '"
  ) as error:
    check_label(label, 10, "here")
  assert len(str(error.value)) < 120


def test_ids_that_are_nested(tmp_path):
  for ids in (nested(), {"a": nested()}, b"text"):
    made_up.write_pickles(
      tmp_path, "lra-text", [{"input_ids_0": ids, "label": 1}]
    )
    message = refusal("text", tmp_path, tmp_path, val="lra")
    assert "input_ids_0 must be an array of integers" in message


@pytest.fixture
def refused(tmp_path):
  def refused(content, match):
    path = tmp_path / "x.pickle"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
      pickles.load(path, max_bytes=2**30)
    message = str(caught.value)
    assert "\n" not in message and "x.pickle" in message

  return refused


def test_an_object_that_is_numbered_twice(tmp_path):
  path = tmp_path / "x.pickle"
  # [(), ()], with number 1 for both and number 0 for the list again.
  path.write_bytes(b"\x80\x02]q\0()q\1q\1e()q\1q\0e.")
  assert pickles.load(path, max_bytes=99) == [(), ()]


STRING = b"X" + struct.pack("<I", 2**16) + b"a" * 2**16 + b"q\0"
ENCODED = b"c_codecs\nencode\nq\1h\0X\x06\0\0\0latin1\x86R"


def test_copies_are_counted(refused):
  again = b"h\1h\0X\x06\0\0\0latin1\x86R"
  refused(
    b"\x80\x02(" + STRING + ENCODED + again * 20 + b"l.",
    "copies its strings again",
  )
  # An array in another byte order, whose numbers numpy copies to swap them.
  kind = b"cnumpy\ndtype\nU\x02i8K\0K\1\x87R(K\3U\1>NNNJ\xff\xff\xff\xffJ\xff"
  kind += b"\xff\xff\xffK\0tb"
  raw = b"B" + struct.pack("<I", 2**16) + bytes(2**16)
  state = b"((K\1J\0\x20\0\0\x85" + kind + b"\x89" + raw + b"tq\0"
  array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b"
  array += b"\x87Rq\1"
  refused(
    b"\x80\x02" + state + (array + b"h\0b") * 9 + b"l.",
    "copies its strings again",
  )
  refused(b"\x80\x02" + state + array + b"h\0bh\0b" + b"l.", "count")


def test_opcodes_are_counted(refused, monkeypatch):
  monkeypatch.setattr(pickles, "_MIN_STEPS", 1000)
  for opcode in (b"]", b"}", b"(", b")", b"N", b"K\1", b"J\0\0\0\1"):
    refused(b"\x80\x02" + opcode * 2000, "it has more than .* opcodes")


@pytest.mark.slow
def test_memory_of_a_bomb(tmp_path):
  # Two bytes for an object that is held, and a number that is remembered.
  path = tmp_path / "x.pickle"
  path.write_bytes(b"\x80\x04" + b"]\x94" * 2**22)
  tracemalloc.start()
  with pytest.raises(ValueError, match="more than .* opcodes"):
    pickles.load(path, max_bytes=2**30)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 2**29


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (b"\x80\x04\x8e" + struct.pack("<Q", 2**62), "expected 46116860"),
    (b"\x80\x04\x96" + struct.pack("<Q", 2**40), "expected 1099511627776 by"),
    (b"\x80\x02\x8b\xff\xff\xff\x7f", "no complete pickle"),
    (b"\x80\x02B\xff\xff\xff\xff", "expected 4294967295 bytes"),
    (b"L" + b"9" * 5000 + b"L\n.", "no complete pickle"),
    (b"\x80\x02\x8b\x00\x20\0\0" + b"\x7f" * 2**13 + b".", "of 65535 bits"),
    (b"}p-1\n.", "gives number -1 to object 0"),
    (b"}p99999999999999\n.", "gives number 99999999999999 to"),
    (b"\x80\x02}\x8a\x05\1\1\1\1\1K\1s.", "neither text nor a short integer"),
  ],
)
def test_huge_numbers(refused, content, match):
  refused(content, match)


def test_long_tuples_are_not_copied(refused):
  # A dtype that gets a state of 2**15 members, 2**19 times.
  members = b"(" + b"N" * 2**15 + b"tq\0"
  kind = b"cnumpy\ndtype\nU\x02i8K\0K\x01\x87R"
  start = b"\x80\x02(" + members
  refused(start + kind + b"h\0b" * 2**19 + b"l.", "a tuple of at most 9 values")
  refused(start + b"cnumpy\ndtype\nh\0Rl.", "but 32769 were given")


# Descriptions of TensorFlow Datasets.

EVIL = "evil_module_of_a_test"


@pytest.fixture
def prepared(tmp_path):
  made_up_tfds = pytest.importorskip("tests.data.made_up_tfds")
  return made_up_tfds.write_imdb(tmp_path / "t", count=4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("legacy", [False, True, "snake"])
def test_no_module_is_imported(tmp_path, monkeypatch, prepared, legacy):
  (tmp_path / f"{EVIL}.py").write_text("raise SystemExit('it was run')")
  monkeypatch.syspath_prepend(tmp_path)
  path = prepared / "features.json"
  described = json.loads(path.read_text())
  text = described["featuresDict"]["features"]["text"]
  if legacy is True:
    text = {"type": f"{EVIL}.Text", "content": {}}
  elif legacy:
    text = {"python_class_name": f"{EVIL}.Text", "text": {}}
  else:
    text["pythonClassName"] = f"{EVIL}.Text"
  described["featuresDict"]["features"]["text"] = text
  path.write_text(json.dumps(described))
  message = refusal("text", prepared, tmp_path)
  assert "features.json must name features of Tens" in message
  assert EVIL in message and EVIL not in sys.modules


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
  "change",
  [
    {"version": ""},
    {"version": "x"},
    {"splits": []},
    {"splits": [{"name": "train", "shardLengths": ["9" * 30]}]},
    {"splits": 5},
  ],
)
def test_descriptions_that_are_wrong(tmp_path, prepared, change):
  path = prepared / "dataset_info.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  message = refusal("text", prepared, tmp_path)
  assert "is damaged (" in message and "prepare the data again" in message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pictures_that_are_bombs(tmp_path):
  made_up_tfds = pytest.importorskip("tests.data.made_up_tfds")
  black = np.zeros((1, 4_000, 4_000), np.uint8)
  made_up_tfds.write_images(
    tmp_path, "pathfinder32", {"hard": [black[0]] * 5}, {"hard": [0] * 5}
  )
  tracemalloc.start()
  message = refusal("pathfinder", tmp_path, tmp_path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert "must be 32 x 32 pixels" in message and peak < 2**23


# Lists and arrays.


@pytest.mark.parametrize(
  "name", ["a\0b", "\x1b[31m", "x" * 300, "bild-\udce9", "é.png", "\ufeff"]
)
def test_names_of_pictures(tmp_path, name):
  top = made_up.write_pathfinder(tmp_path, batches=1, count=5)
  row = os.fsencode(f"imgs/0 {name} 0 1 1.8\n")
  (top / "metadata" / "0.npy").write_bytes(row)
  message = refusal("pathfinder", tmp_path, tmp_path)
  assert "0.npy line 1: expected the folder and the name of a" in message


def test_numbers_that_are_no_characters(tmp_path):
  top = made_up.write_pathfinder(tmp_path, batches=1, count=5, as_array=True)
  path = top / "metadata" / "0.npy"
  content = bytearray(path.read_bytes())
  content[-1] = 0x7F
  path.write_bytes(content)
  assert "0.npy row 5: it is no text" in refusal("pathfinder", top, tmp_path)


@pytest.mark.parametrize(
  "header",
  [
    "{'descr': '<U9', 'shape': (1L, 5, 'fortran_order': False}",
    "{'descr': '<U9', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}",
    "(" * 9000,
    "-" * 9000 + "1",
    "'''",
    "{'descr': ('<U9', (-1,)), 'fortran_order': False, 'shape': (1, 1)}",
    "{'descr': '<U99999999999', 'fortran_order': False, 'shape': (1, 5)}",
    "{'descr': '<U9', 'fortran_order': False, 'shape': (-1, 5)}",
    "{'descr': '<U9', 'fortran_order': 3, 'shape': (2, 5)}",
  ],
)
def test_headers_of_arrays(tmp_path, header):
  top = made_up.write_pathfinder(tmp_path, batches=1, count=5)
  content = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode()
  (top / "metadata" / "0.npy").write_bytes(content + bytes(99))
  message = refusal("pathfinder", tmp_path, tmp_path)
  assert "0.npy is no array of strings (" in message


@pytest.mark.parametrize("name", ["offsets.npy", "labels.npy", "tokens_2.npy"])
@pytest.mark.parametrize(
  ("array", "reason"),
  [
    (np.zeros(2), "must have one axis of .*, got float64"),
    (np.zeros((2, 2), np.int32), "must have one axis"),
    (np.array(["a", "b"]), "must have one axis"),
    (np.zeros(0, np.int16), "must have one axis"),
  ],
)
def test_types_in_the_cache(tmp_path, name, array, reason):
  fuzz.write_cached(tmp_path)
  np.save(cache.split_folder(fuzz.TOY, "dev", tmp_path) / name, array)
  with pytest.raises(ValueError, match=f"is damaged .{name} {reason}"):
    fuzz.read_cached(tmp_path)


@pytest.mark.parametrize(
  "change",
  [
    {"format": 2},
    {"format": None},
    {"tables": []},
    {"tables": {"majority label": []}},
    {"facts": None},
    {"fingerprint": None},
  ],
)
def test_meta_of_the_cache(tmp_path, change):
  fuzz.write_cached(tmp_path)
  for split in data.SPLITS:
    path = cache.split_folder(fuzz.TOY, split, tmp_path) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match="is damaged .*; delete it") as caught:
    fuzz.read_cached(tmp_path)
  assert "\n" not in str(caught.value)
  path.write_text("[" * 100_000)
  with pytest.raises(ValueError, match="is damaged .*; delete it"):
    cache.load_split(fuzz.TOY, "test", tmp_path)
