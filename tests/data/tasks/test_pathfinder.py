"""Pathfinder and Path-X from pictures and lists."""

import logging
import struct
import zlib

import numpy as np
import pytest

from spectraformer_jax import data
from spectraformer_jax.data.readers.reader import find_data
from tests.data import made_up

SIDES = {"pathfinder": 32, "pathx": 128}


@pytest.fixture
def load(tmp_path):
  return lambda split="train", task="pathfinder", **options: data.load(
    task,
    split,
    **{"data_dir": tmp_path / "lra", "cache_dir": tmp_path / "cache"} | options,
  )


@pytest.fixture
def folder(tmp_path):
  return made_up.write_pathfinder(tmp_path / "lra")


def labels_match(dataset):
  """Made-up pictures carry their label in the first pixel."""
  return [e["tokens"][0] for e in dataset] == dataset.labels.tolist()


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("task", SIDES)
def test_pictures_labels_and_split(load, tmp_path, task, as_array):
  side = SIDES[task]
  made_up.write_pathfinder(tmp_path / "lra", side, as_array=as_array)
  splits = {split: load(split, task) for split in data.SPLITS}
  assert sum(map(len, splits.values())) == 60
  assert all(labels_match(dataset) for dataset in splits.values())
  contents = [{e["tokens"].tobytes() for e in d} for d in splits.values()]
  assert len(set.union(*contents)) == sum(map(len, contents)) == 60
  train = splits["train"]
  assert train.length == side * side
  assert (train.vocab_size, train.num_classes) == (256, 2)
  assert train.name == f"{task}-hash_split"
  assert (train.provenance, train.tokenizer) == ("lra-files", "pixels")
  assert 0.6 < len(train) / 60 < 0.95


def test_order_is_by_batch_and_number_and_not_by_list(load, tmp_path):
  # Lists are written backwards, and 10 stands before 2 in the folder.
  top = made_up.write_pathfinder(tmp_path / "lra", batches=11, count=12)
  found = find_data("pathfinder", tmp_path)
  pixels = [row.tokens.reshape(32, 32) for row in found.examples("all")]
  assert len(pixels) == 132
  for index, (batch, i) in ((0, (0, 0)), (14, (1, 2)), (131, (10, 11))):
    picture = top / "imgs" / str(batch) / f"sample_{i}.png"
    assert made_up.png(pixels[index]) == picture.read_bytes()


def test_split_depends_on_content_and_seed(load, folder):
  dev = {e["tokens"].tobytes() for e in load("dev")}
  other = {e["tokens"].tobytes() for e in load("dev", seed=1)}
  assert dev != other


@pytest.mark.parametrize("inside", ["", "pathfinder32", None])
def test_the_folder_itself_will_do(load, folder, tmp_path, inside):
  place = folder if inside is None else tmp_path / "lra" / inside
  train = load(data_dir=place)
  assert train.fingerprint == load().fingerprint


def test_inner_folder_is_read_for_pathx(load, tmp_path, caplog):
  outer = tmp_path / "lra" / "lra_release"
  made_up.write_pathfinder(outer, 128, count=10, seed=1)
  inner = outer / "lra_release"
  made_up.write_pathfinder(inner, 128, count=12, seed=2)
  with caplog.at_level(logging.INFO):
    splits = [load(split, "pathx") for split in data.SPLITS]
  assert sum(map(len, splits)) == 24
  assert f"reading the inner one, {inner / 'pathfinder128'}, not" in caplog.text
  assert f"pathx: Pathfinder files 128 x 128 in {inner}" in caplog.text


def test_empty_pictures_are_left_out_and_counted(load, folder, caplog):
  for i in range(3):
    (folder / "imgs" / "0" / f"sample_{i}.png").write_bytes(b"")
  assert sum(len(load(split)) for split in data.SPLITS) == 57
  assert "left out 3 empty picture(s): imgs/0/sample_0.png, " in caplog.text


def test_more_than_ten_empty_pictures_are_an_error(load, folder):
  for i in range(11):
    (folder / "imgs" / "1" / f"sample_{i}.png").write_bytes(b"")
  with pytest.raises(
    ValueError, match="more than 10 empty pictures .* and more"
  ):
    load()


def chunk(kind, content):
  """One chunk of a PNG."""
  check = struct.pack(">I", zlib.crc32(kind + content))
  return struct.pack(">I", len(content)) + kind + content + check


def bomb(width, height):
  """A PNG that unpacks to that many zeros."""
  header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  rows = zlib.compress(bytes((width + 1) * height))
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    chunk(*part)
    for part in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
  )


GOOD = made_up.png(np.zeros((32, 32), np.uint8))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"GIF89a", "must be a 32 x 32 PNG in 8-bit gray"),
    (made_up.png(np.zeros((16, 64), np.uint8)), "must be a 32 x 32 PNG"),
    (made_up.png(np.zeros((32, 32, 3), np.uint8)), "in 8-bit gray"),
    (bomb(2000, 2000), "must be a 32 x 32 PNG"),
    (GOOD[:20], "must be a 32 x 32 PNG"),
    (GOOD[:50], "is damaged"),
    (GOOD[:41] + b"xxxx" + GOOD[45:], "is damaged"),
  ],
)
def test_pictures_of_another_kind(load, folder, content, message):
  (folder / "imgs" / "0" / "sample_3.png").write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    load()
  assert "sample_3.png" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_picture(load, folder):
  (folder / "imgs" / "0" / "sample_3.png").unlink()
  with pytest.raises(ValueError, match="sample_3.png is missing, though 0.npy"):
    load()


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "0.npy must list at least one image, it is empty"),
    ("imgs/0 sample_0.png 0\n", "line 1: expected folder, .* got 3 columns"),
    ("imgs/0 sample_0.png 0 7 1.8\n", "line 1: the label must .* got '7'"),
    ("../.. sample_0.png 0 1\n", "line 1: pictures must lie below the folder"),
    ("imgs/0 ../../x.png 0 1\n", "line 1: pictures must lie below the folder"),
    ("/etc passwd 0 1\n", "line 1: pictures must lie below the folder"),
    ("imgs/0 /etc/passwd 0 1\n", "line 1: pictures must lie below the folder"),
  ],
)
def test_lists_of_another_kind(load, folder, text, message):
  (folder / "metadata" / "0.npy").write_text(text)
  with pytest.raises(ValueError, match=message) as caught:
    load()
  assert "\n" not in str(caught.value)


def npy_header(description, shape):
  """The start of an array file that promises a shape."""
  header = (
    f"{{'descr': '{description}', 'fortran_order': False, 'shape': {shape}}}"
  )
  header = header.ljust(117) + "\n"
  return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode()


def test_arrays_of_another_kind(load, folder):
  path = folder / "metadata" / "0.npy"
  np.save(path, np.array([["a", 1]], object), allow_pickle=True)
  with pytest.raises(ValueError, match="0.npy is no array of strings"):
    load()
  for array in (np.zeros((2, 5)), np.array(["text"])):
    np.save(path, array)
    with pytest.raises(
      ValueError, match=r"must be an array of strings \[images"
    ):
      load()
  for content in (
    npy_header("<U9", (10**12, 5)),
    b"\x93NUMPY\1\0",
    npy_header("<U9", "__import__('os')"),
  ):
    path.write_bytes(content)
    with pytest.raises(
      ValueError, match="0.npy is no array of strings"
    ) as error:
      load()
    assert "\n" not in str(error.value)


def test_lists_without_pictures(load, folder):
  for path in (folder / "metadata").iterdir():
    path.unlink()
  with pytest.raises(ValueError, match="metadata must hold <batch>.npy"):
    load()


def test_another_difficulty(load, folder):
  folder.rename(folder.with_name("curv_baseline"))
  with pytest.raises(
    ValueError, match="curv_contour_length_14/metadata, the dif"
  ):
    load()
  with pytest.raises(ValueError, match="it holds curv_baseline"):
    load()
