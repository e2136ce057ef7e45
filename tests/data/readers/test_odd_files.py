"""Empty files and folders, one line, line ends, byte order marks, encodings."""

import numpy as np
import pytest

from spectraformer_jax import data
from spectraformer_jax.data.formats import listops_text, pickles
from tests.data import made_up

BOM = b"\xef\xbb\xbf"
HEADER = b"Source\tTarget\n"


@pytest.fixture
def listops(tmp_path):
  """A function that reads a training file of ListOps."""
  folder = made_up.write_listops(tmp_path / "listops-1000", count=4)

  def listops(content):
    (folder / "basic_train.tsv").write_bytes(content)
    return data.load(
      "listops", "train", data_dir=folder, cache_dir=tmp_path / "cache"
    )

  return listops


@pytest.fixture
def pairs(tmp_path):
  """A function that reads a training file of Retrieval."""
  folder = made_up.write_aan(tmp_path / "tsv_data")

  def pairs(content, **options):
    (folder / "new_aan_pairs.train.tsv").write_bytes(content)
    return data.load(
      "retrieval",
      "train",
      data_dir=folder,
      cache_dir=tmp_path / "cache",
      **options,
    )

  return pairs


def rows(dataset):
  return [(e["tokens"].tolist(), e["label"]) for e in dataset]


def test_line_ends_and_marks_are_no_data(listops, pairs):
  plain = rows(listops(HEADER + b"[MAX 1 2 ]\t2\n"))
  assert plain == [([12, 2, 3, 15], 2)]
  for content in (
    b"Source\tTarget\r\n[MAX 1 2 ]\t2\r\n",
    BOM + HEADER + b"[MAX 1 2 ]\t2",
    BOM + b"Source\tTarget\r\n[MAX 1 2 ]\t2",
  ):
    assert rows(listops(content)) == plain
  plain = rows(pairs(b"1\ta\tb\tone\ttwo\n"))
  assert rows(pairs(BOM + b"1\ta\tb\tone\ttwo\r\n")) == plain


def test_a_mark_within_is_data(listops, pairs):
  with pytest.raises(ValueError, match="train.tsv line 2: Unknown ListOps"):
    listops(HEADER + BOM + b"[MAX 1 2 ]\t2\n")
  twice = pairs(b"1\ta\tb\t" + BOM + b"x\ty\n")
  assert twice[0]["tokens"].tolist() == [b + 1 for b in BOM + b"x"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "train.tsv must hold the header .*, it has 0 lines"),
    (BOM, "line 1: expected the header 'Source<TAB>Target', got ''"),
    (HEADER, "it has 1 lines: a split of no examples"),
    (HEADER[:-1], "it has 1 lines"),
    (b"[MAX 1 ]\t1\n", "train.tsv line 1: expected the header"),
    (HEADER.decode().encode("utf-16"), "train.tsv line 1: expected the header"),
    (HEADER + b"\n", "line 2: expected an expression, a tab and its value"),
    (HEADER + b"[MAX 1 \xff ]\t1\n", "line 2: Unknown ListOps token '\ufffd'"),
    (HEADER + b"[MAX 1 ]\t\xff\n", "line 2: the label must be .* got '\ufffd'"),
    (HEADER + b"[MAX 1 ]\t0_3\n", "line 2: the label must be .* got '0_3'"),
    (HEADER + b"[MAX 3 ]\t 3 \n", "line 2: the label must be .* got ' 3 '"),
    (HEADER + b"[MAX 3 ]\t3e0\n", "line 2: the label must be .* got '3e0'"),
    (HEADER + b"[MAX 3 ]\t" + b"9" * 5000, "line 2: the label must be"),
    (HEADER + b"[MAX \0 ]\t1\n", r"line 2: Unknown ListOps token '\\x00'"),
    (HEADER + b"[MAX " + b"x" * 9999 + b" ]\t1\n", "line 2: Unknown .*xxx..."),
    (HEADER + b"[MAX 1\t1\n", "line 2: brackets must balance, got 1 operator"),
    (HEADER + b"[MAX 1 ] ]\t1\n", "line 2: brackets must balance"),
    (HEADER + b"[MAX 1 ] 2\t1\n", "line 2: brackets must balance"),
    (HEADER + b"1 2\t1\n", "line 2: brackets must balance"),
    (HEADER + b"] [MAX 1\t1\n", "line 2: brackets must balance"),
    (HEADER + b"[MAX ]\t1\n", "line 2: an operator must have an argument"),
    (HEADER + b") [MAX 1 ] (\t1\n", r"line 2: parentheses must .*'\)' before"),
  ],
)
def test_expressions(listops, content, message):
  with pytest.raises(ValueError, match=message) as caught:
    listops(content)
  assert "basic_train.tsv" in str(caught.value)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_complete_can_be_evaluated():
  rng = np.random.default_rng(0)
  found = {True: 0, False: 0}
  ids = np.array([2, 3, 11, 14, 15, 15])
  for _ in range(3000):
    tokens = rng.choice(ids, rng.integers(1, 8)).astype(np.uint8)
    complete = []
    for check in (listops_text.check_complete, listops_text.evaluate):
      try:
        check(tokens)
        complete.append(True)
      except ValueError:
        complete.append(False)
    assert complete[0] == complete[1], tokens
    found[complete[0]] += 1
  assert min(found.values()) > 100


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "train.tsv must hold pairs, it is empty"),
    (b"\n", "train.tsv line 1: expected 5 columns"),
    (b"1\ta\tb\tx\ty\n\n", "train.tsv line 2: expected 5 columns"),
    (b"\xff\ta\tb\tx\ty\n", "line 1: the label must be .* got '\ufffd'"),
    (b"1_0\ta\tb\tx\ty\n", "line 1: the label must be .* got '1_0'"),
    (b"1\ta\tb\t\ty\n", "line 1: expected two texts"),
  ],
)
def test_pairs(pairs, content, message):
  with pytest.raises(ValueError, match=message) as caught:
    pairs(content)
  assert "new_aan_pairs.train.tsv" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_bytes_of_texts_stay_as_they_are(pairs, tmp_path):
  raw = bytes(b for b in range(256) if b not in b"\t\n\r")
  only = pairs(b"1\ta\tb\t" + raw + b"\ty\n")
  assert only[0]["tokens"].tolist() == [b + 1 for b in raw]
  top = made_up.write_aclimdb(tmp_path / "aclImdb", count=1)
  (top / "test" / "neg" / "0_2.txt").write_bytes(BOM + b"a\r\n\xff\r\n")
  test = data.load(
    "text", "test", data_dir=top, cache_dir=tmp_path / "c", val="lra"
  )
  assert test[0]["tokens"].tolist() == [b + 1 for b in BOM + b"a\r\n\xff"]


PRINTED = [b"b'a'", b'b"it\'s"', rb"b'\xc3\xa9\n\t\r\\ \' \"'", b"b'~ \"'"]
NOT_PRINTED = [b"b''b''", rb"b'\d'", rb"b'\u0041'", b"B'a'", b"b'\xc3'", b"b'a"]


def test_printed_bytes_are_those_of_python(pairs):
  for text in PRINTED:
    assert repr(eval(text)) == text.decode() or b"\\" in text or b'"' in text
    only = pairs(b"1\ta\tb\t" + text + b"\tb'y'\n", literal="decode")
    assert only[0]["tokens"].tolist() == [b + 1 for b in eval(text)]
  everything = repr(bytes(range(256))).encode()
  only = pairs(b"1\ta\tb\t" + everything + b"\tb'y'\n", literal="decode")
  assert only[0]["tokens"].tolist() == list(range(1, 257))
  for text in NOT_PRINTED:
    with pytest.raises(ValueError, match="line 1: literal='decode' needs"):
      pairs(b"1\ta\tb\t" + text + b"\tb'y'\n", literal="decode")


@pytest.mark.parametrize("part", ["train/neg", "test/pos"])
def test_a_folder_without_reviews(tmp_path, part):
  top = made_up.write_aclimdb(tmp_path / "aclImdb", count=2)
  for path in (top / part).glob("*.txt"):
    path.unlink()
  with pytest.raises(ValueError, match=f"{part} must hold reviews .* none"):
    data.load("text", "train", data_dir=top, cache_dir=tmp_path / "c")


def test_lists_of_pictures(tmp_path):
  top = made_up.write_pathfinder(tmp_path, batches=1, count=20)
  path = top / "metadata" / "0.npy"
  load = lambda: sum(
    (
      rows(
        data.load(
          "pathfinder", split, data_dir=tmp_path, cache_dir=tmp_path / "c"
        )
      )
      for split in data.SPLITS
    ),
    [],
  )
  plain = load()
  path.write_bytes(BOM + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
  assert load() == plain
  path.write_bytes(b"")
  with pytest.raises(ValueError, match="0.npy must list at least one image"):
    load()
  path.write_bytes(b"x" * 5000)
  with pytest.raises(ValueError, match="0.npy line 1: lines must have at most"):
    load()


@pytest.mark.parametrize("name", ["data_batch_1.bin", "test_batch"])
def test_empty_batches_of_images(tmp_path, name):
  write = (
    made_up.write_cifar_binary
    if name.endswith(".bin")
    else made_up.write_cifar_python
  )
  folder = write(tmp_path / "cifar")
  (folder / name).write_bytes(b"")
  with pytest.raises(ValueError, match=f"{name} (must be|is no complete)"):
    for split in data.SPLITS:
      data.load("image", split, data_dir=folder, cache_dir=tmp_path / "c")


def test_an_empty_list_of_examples(tmp_path):
  made_up.write_pickles(tmp_path, "lra-text", [])
  with pytest.raises(ValueError, match="none of its 0 examples .pickles lra-"):
    data.load("text", "train", data_dir=tmp_path, cache_dir=tmp_path / "c")
  (tmp_path / "x").write_bytes(b"")
  with pytest.raises(ValueError, match="x is no complete pickle"):
    pickles.load(tmp_path / "x", max_bytes=99)


@pytest.mark.parametrize(
  "task", ["fashion", "image", "listops", "pathfinder", "retrieval", "text"]
)
def test_an_empty_folder(tmp_path, task):
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="must hold .*: it holds nothing"):
    data.load(
      task, "train", data_dir=tmp_path / "empty", cache_dir=tmp_path / "c"
    )
