"""Image from CIFAR-10 batches."""

import hashlib
import pickle

import numpy as np
import pytest

from spectraformer_jax import data
from spectraformer_jax.data.formats.grayscale import rgb_to_gray
from tests.data import made_up

FORMS = {
  "cifar-10-batches-bin": made_up.write_cifar_binary,
  "cifar-10-batches-py": made_up.write_cifar_python,
}


@pytest.fixture(params=FORMS)
def folder(request, tmp_path):
  return FORMS[request.param](tmp_path / request.param)


@pytest.fixture
def load(tmp_path):
  return lambda split="train", **options: data.load(
    "image",
    split,
    **{"data_dir": tmp_path, "cache_dir": tmp_path / "cache"} | options,
  )


def images(dataset):
  return sorted((e["tokens"].tobytes(), e["label"]) for e in dataset)


def expected(seeds):
  rows = []
  for seed in seeds:
    colour, labels = made_up.cifar_images(10, seed)
    for image, label in zip(colour, labels, strict=True):
      rows.append((rgb_to_gray(*image.reshape(3, 1024)).tobytes(), int(label)))
  return sorted(rows)


@pytest.mark.parametrize(
  ("colour", "gray"),
  [
    ((255, 0, 0), 76),
    ((0, 255, 0), 149),
    ((0, 0, 255), 29),
    ((200, 100, 50), 124),
    ((255, 255, 255), 255),
    ((0, 0, 0), 0),
  ],
)
def test_gray_of_colours(colour, gray):
  planes = (np.array([c], np.uint8) for c in colour)
  assert rgb_to_gray(*planes).tolist() == [gray]


def test_gray_of_all_colours_is_that_of_tensorflow():
  # The digest is that of tf.image.rgb_to_grayscale of TensorFlow 2.21 on a CPU,
  # over all 16.7 million colours.
  level = np.arange(256, dtype=np.uint8)
  digest = hashlib.sha256()
  for red in level:
    planes = np.meshgrid([red], level, level, indexing="ij")
    digest.update(rgb_to_gray(*planes).tobytes())
  assert digest.hexdigest() == (
    "824a76d81dad2c5a2cf1fa0b2c0a5afe7d871ec2970e4fa2809b53ddbecdca93"
  )


def test_images_and_split(load, folder):
  train, dev, test = (images(load(split)) for split in data.SPLITS)
  assert sorted(train + dev) == expected(range(5))
  assert test == expected([5])
  assert dev and not set(train) & set(dev)
  assert images(load("dev", seed=1)) != dev
  facts = load()
  assert facts.name == "image-hash_split"
  assert (facts.vocab_size, facts.length, facts.num_classes) == (256, 1024, 10)
  assert (facts.tokenizer, facts.provenance) == ("pixels", "lra-files")


def test_black_is_no_padding(load, tmp_path):
  folder = made_up.write_cifar_binary(tmp_path / "cifar-10-batches-bin")
  (folder / "test_batch.bin").write_bytes(bytes(3073) * 3)
  batch = next(data.Batches(load("test"), 3, seed=0, train=False))
  assert not batch["tokens"].any() and batch["length"].tolist() == [1024] * 3


def test_binary_batches_are_preferred(load, tmp_path):
  for name, write in FORMS.items():
    write(tmp_path / name)
  assert load().settings["reader"] == "CIFAR-10 binary batches"


def test_both_forms_hold_the_same_images(load, tmp_path):
  fine = [
    images(load("train", data_dir=write(tmp_path / name)))
    for name, write in FORMS.items()
  ]
  assert fine[0] == fine[1]


@pytest.mark.parametrize(
  ("size", "message"),
  [(0, "got 0 bytes"), (3074 * 5, "3073 bytes per image, got 15370 bytes")],
)
def test_binary_batches_of_the_wrong_size(load, tmp_path, size, message):
  folder = made_up.write_cifar_binary(tmp_path / "cifar-10-batches-bin")
  (folder / "data_batch_3.bin").write_bytes(bytes(size))
  with pytest.raises(ValueError, match=message):
    load()


def test_label_out_of_range(load, tmp_path):
  folder = made_up.write_cifar_binary(tmp_path / "cifar-10-batches-bin")
  (folder / "test_batch.bin").write_bytes(bytes(3073) + b"\x0a" + bytes(3072))
  with pytest.raises(ValueError, match="test_batch.bin image 1: .* got '10'"):
    load("test")


def test_missing_batch(load, folder):
  sorted(folder.iterdir())[2].unlink()
  with pytest.raises(ValueError, match="must hold data_batch_3.*is missing"):
    load()


@pytest.mark.parametrize(
  "batch",
  [
    [1, 2],
    {"data": np.zeros((2, 3072), np.uint8)},
    {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
    {"data": np.zeros((2, 3072), np.int64), "labels": [1, 2]},
    {"data": np.zeros((2, 1024), np.uint8), "labels": [1, 2]},
    {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1, 2]},
  ],
)
def test_python_batches_of_another_kind(load, tmp_path, batch):
  folder = made_up.write_cifar_python(tmp_path / "cifar-10-batches-py")
  (folder / "test_batch").write_bytes(pickle.dumps(batch))
  with pytest.raises(ValueError, match="test_batch must hold 'data', uint8"):
    load("test")


def test_hostile_python_batch(load, tmp_path):
  folder = made_up.write_cifar_python(tmp_path / "cifar-10-batches-py")
  mark = tmp_path / "mark"
  content = f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode()
  (folder / "test_batch").write_bytes(content)
  with pytest.raises(ValueError, match="asks for 'posix.system'"):
    load("test")
  assert not mark.exists()
