import collections

import numpy as np
import pytest
from sklearn.datasets import load_digits

from spectraformer_jax import data


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache")
  return lambda split, seed=0: data.load(
    "digits", split, cache_dir=folder, seed=seed
  )


def images(dataset):
  """How often each (image, label) occurs."""
  return collections.Counter(
    (example["tokens"].tobytes(), example["label"]) for example in dataset
  )


def test_splits_hold_every_image_once(load):
  pixels, labels = load_digits(return_X_y=True)
  expected = collections.Counter(
    (image.astype(np.uint8).tobytes(), label)
    for image, label in zip(pixels, labels, strict=True)
  )
  assert sum((images(load(s)) for s in data.SPLITS), start=images([])) == (
    expected
  )


def test_splits_share_no_image_and_have_about_the_promised_sizes(load):
  contents = [{image for image, _ in images(load(s))} for s in data.SPLITS]
  assert sum(map(len, contents)) == len(set.union(*contents))
  # Four standard deviations of a binomial: 68 at 80 %, 51 at 10 %.
  sizes = [len(load(split)) for split in data.SPLITS]
  assert np.abs(np.subtract(sizes, [1438, 180, 180])).max() < 68


def test_split_depends_on_the_seed_alone(load, tmp_path):
  again = data.load("digits", "dev", cache_dir=tmp_path)
  assert again.fingerprint == load("dev").fingerprint
  assert images(load("dev", seed=1)) != images(load("dev"))


def test_facts(load):
  digits = load("train")
  assert (digits.vocab_size, digits.num_classes, digits.length) == (17, 10, 64)
  assert digits.provenance == "stand-in"
  assert digits.tokens.min() == 0 and digits.tokens.max() == 16
  # Black pixels are id 0 as well, yet all 64 positions are real.
  batch = next(data.Batches(digits, 8, seed=0, train=True))
  assert (batch["tokens"] == 0).any()
  assert (batch["length"] == 64).all()
  assert 0.09 < digits.baselines["majority label"] < 0.13
