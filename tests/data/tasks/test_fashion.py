"""Fashion-MNIST from its idx files and from the Debian package."""

import gzip

import numpy as np
import pytest

from spectraformer_jax import data
from spectraformer_jax.data import packages
from tests.data import made_up_packages as made_up


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "fashion-mnist"
  folder.mkdir()
  for name, content in made_up.fashion_files().items():
    (folder / name).write_bytes(content)
  return folder


def load(tmp_path, split="train", **options):
  return data.load("fashion", split, cache_dir=tmp_path / "cache", **options)


def test_images_are_centred_on_black(tmp_path, folder):
  test = load(tmp_path, "test", data_dir=tmp_path)
  assert (len(test), test.length, test.provenance) == (20, 1024, "stand-in")
  images, _ = made_up.idx_files(20, 1)
  pixels = np.frombuffer(images, np.uint8, offset=16).reshape(20, 28, 28)
  for i, example in enumerate(test):
    image = example["tokens"].reshape(32, 32)
    assert (image[2:30, 2:30] == pixels[i]).all()
    assert np.count_nonzero(image) == 28 * 28
    assert example["label"] == i % 10


def test_dev_is_part_of_train(tmp_path, folder):
  train, dev = (load(tmp_path, s, data_dir=folder) for s in ("train", "dev"))
  images = [e["tokens"].tobytes() for d in (train, dev) for e in d]
  assert len(images) == len(set(images)) == 60 and 0 < len(dev) < 20


def test_package_and_files_are_the_same(tmp_path, folder, pin):
  deb = made_up.write_deb(tmp_path / "debian", made_up.fashion_files())
  pin(packages.FASHION_MNIST, deb)
  wanted = load(tmp_path, "test", data_dir=folder)
  found = load(tmp_path, "test", data_dir=deb.parent)
  assert (found.tokens == wanted.tokens).all()
  assert found.settings["reader"] == deb.name
  deb.rename(tmp_path / "elsewhere")  # the cache does without
  assert load(tmp_path, "test").fingerprint == found.fingerprint


def test_another_package_is_refused(tmp_path):
  deb = made_up.write_deb(tmp_path / "debian", {})
  with pytest.raises(ValueError, match="must have the SHA-256 39e172fe"):
    load(tmp_path, data_dir=deb.parent)


def test_plain_files(tmp_path, folder):
  wanted = load(tmp_path, "test", data_dir=folder)
  for path in list(folder.iterdir()):
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
  found = load(tmp_path, "test", data_dir=folder)
  assert (found.tokens == wanted.tokens).all()


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("images-idx3", lambda c: c[:-1], "cut off, 1 bytes are missing"),
    ("images-idx3", lambda c: c[:10], "cut off, 6 bytes are missing"),
    ("images-idx3", lambda c: b"\0\0\x08\1" + c[4:], "starts with 0x00000803"),
    ("labels-idx1", lambda c: c[:7] + b"\1" + c[8:], "2 images.* and 1 labels"),
    ("labels-idx1", lambda c: c[:-1] + b"\x0a", "image 1: the label must be"),
    (
      "images-idx3",
      lambda c: c[:11] + b"\x40" + c[12:],
      "2 images of 64 x 28",
    ),
  ],
)
def test_damaged_files(tmp_path, folder, name, change, message):
  images, labels = made_up.idx_files(2, 0)
  content = change(images if name.startswith("images") else labels)
  for part in ("train", "t10k"):
    for kind, whole in (("images-idx3", images), ("labels-idx1", labels)):
      used = content if kind == name else whole
      path = folder / f"{part}-{kind}-ubyte.gz"
      path.write_bytes(gzip.compress(used))
  with pytest.raises(ValueError, match=message):
    load(tmp_path, "test", data_dir=folder)


def test_broken_gzip(tmp_path, folder):
  path = folder / "t10k-images-idx3-ubyte.gz"
  path.write_bytes(path.read_bytes()[:-2000])
  with pytest.raises(ValueError, match="t10k|test.*a gzip file is damaged"):
    load(tmp_path, "test", data_dir=folder)


def test_a_missing_file_is_named(tmp_path, folder):
  (folder / "t10k-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(ValueError, match="must hold t10k-labels-idx1-ubyte.gz"):
    load(tmp_path, "test", data_dir=folder)
