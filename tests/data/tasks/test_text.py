"""Text from aclImdb."""

import numpy as np
import pytest

from spectraformer_jax import data
from tests.data import made_up


@pytest.fixture
def folder(tmp_path):
  return made_up.write_aclimdb(tmp_path / "aclImdb")


@pytest.fixture
def load(tmp_path, folder):
  return lambda split="train", **options: data.load(
    "text", split, data_dir=folder, cache_dir=tmp_path / "cache", **options
  )


def texts(dataset):
  return [
    ((e["tokens"] - 1).astype(np.uint8).tobytes().decode(), e["label"])
    for e in dataset
  ]


def test_ids_are_bytes_plus_one(load):
  test = load("test")
  assert texts(test)[0] == ("test neg 0<br />é", 0)
  assert texts(test)[-1] == ("test pos 19<br />é", 1)
  assert test[0]["tokens"][-2:].tolist() == [196, 170]
  assert (test.vocab_size, test.id_shift, test.length) == (257, 1, 4000)
  assert (test.provenance, test.tokenizer) == ("lra-files", "bytes")


def test_every_byte_and_padding(load, folder):
  (folder / "test" / "neg" / "0_2.txt").write_bytes(
    b"a" + bytes(range(256)) + b"z"
  )
  test = load("test")
  assert test[0]["tokens"].tolist() == [98, *range(1, 257), 123]
  batch = next(data.Batches(test, 1, seed=0, train=False))
  assert batch["tokens"].dtype == np.uint16
  assert batch["length"].tolist() == [258]
  assert not batch["tokens"][0, 258:].any() and batch["tokens"][0, :258].all()


def test_holdout_is_part_of_train_by_content(load, folder):
  train, dev, test = (texts(load(split)) for split in data.SPLITS)
  everything = [
    (f"train {label} {i}<br />é", number)
    for number, label in enumerate(("neg", "pos"))
    for i in range(20)
  ]
  assert sorted(train + dev) == sorted(everything)
  assert dev and not set(train) & set(dev)
  assert len(test) == 40
  assert load("dev").name == "text-dev_holdout"
  other = texts(load("dev", seed=1))
  assert other != dev


def test_repeated_reviews_stay_together(load, folder):
  for i in range(20):
    for name in ("neg", "pos"):
      stars = {"neg": 2, "pos": 9}[name]
      path = folder / "train" / name / f"{i}_{stars}.txt"
      path.write_text(f"review {i % 19}")
  train, dev = ({t for t, _ in texts(load(s))} for s in ("train", "dev"))
  assert not train & dev and len(train | dev) == 19


def test_lra_validation_is_the_test_set(load):
  dev, test = (load(split, val="lra") for split in ("dev", "test"))
  assert dev.name == "text-dev_is_test"
  assert texts(dev) == texts(test)
  assert len(load("train", val="lra")) == 40
  assert load("train", val="lra", seed=1).fingerprint == (
    load("train", val="lra").fingerprint
  )


def test_the_first_bytes_are_kept(load):
  short = load("test", max_len=6)
  assert short.name == "text-dev_holdout-max_len6"
  assert {text for text, _ in texts(short)} == {"test n", "test p"}


def test_the_split_does_not_depend_on_the_length(load):
  cut = {text[:12] for text, _ in texts(load("dev"))}
  assert {text for text, _ in texts(load("dev", max_len=12))} == cut


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(val="test"), "val must be one of 'holdout', 'lra', got 'test'"),
    (dict(max_len=0), "max_len must be an integer >= 1, got 0"),
    (dict(literal="keep"), "has no option 'literal'"),
  ],
)
def test_options(load, options, message):
  with pytest.raises(ValueError, match=message):
    load(**options)


def test_files_that_are_not_as_they_should_be(load, folder):
  path = folder / "test" / "neg" / "0_2.txt"
  path.write_text(" \n")
  with pytest.raises(
    ValueError, match="0_2.txt must hold a review, it is empty"
  ):
    load("test")
  path.rename(path.with_name("review.txt"))
  with pytest.raises(ValueError, match=r"must be called <id>_<stars>.txt"):
    load()


def test_half_an_archive(load, folder):
  (folder / "test" / "pos").rename(folder / "elsewhere")
  with pytest.raises(ValueError, match="found no test/pos; unpack the archive"):
    load()
