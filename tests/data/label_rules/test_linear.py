"""The simplest models, on data that they must tell apart or must not."""

import numpy as np
import pytest

from spectraformer_jax import data
from spectraformer_jax.data import __main__ as command
from spectraformer_jax.data.label_rules import linear
from spectraformer_jax.data.words import VOCAB_SIZE, hash_words


def splits_of(make):
  sizes = {"train": 120, "dev": 40, "test": 40}
  return {
    split: make(split, size, np.random.default_rng(i))
    for i, (split, size) in enumerate(sizes.items())
  }


def as_texts(rng, first, count):
  words = [f"word{i}" for i in range(40)]
  return [
    " ".join([*rng.choice(words, 6), *first(i)]).encode() for i in range(count)
  ]


TEXT = dict(
  name="toy",
  tokenizer="bytes",
  vocab_size=257,
  id_shift=1,
  num_classes=2,
  length=200,
)


def make_texts(split, size, rng):
  labels = np.arange(size) % 2
  texts = as_texts(rng, lambda i: ["awful", "great"][labels[i] :][:1], size)
  return data.Dataset.from_sequences(
    [list(t) for t in texts], labels, split=split, **TEXT
  )


def make_pairs(split, size, rng):
  labels = np.arange(size) % 2
  one = as_texts(rng, lambda i: [f"topic{i}"] * 2, size)
  two = as_texts(
    rng, lambda i: [f"topic{i if labels[i] else (i + 7) % size}"] * 2, size
  )
  columns = [[list(t) for t in texts] for texts in (one, two)]
  return data.Dataset.from_sequences(
    columns[0], labels, columns[1], split=split, **TEXT
  )


def test_words():
  scores = linear.words(splits_of(make_texts))
  assert scores["train"] == scores["dev"] == scores["test"] == 1.0
  (line,) = linear.describe(splits_of(make_texts))
  assert line.startswith("accuracy of linear model of words and pairs of words")
  assert line.endswith("train 1.000, dev 1.000, test 1.000")


def test_words_that_tell_nothing():
  def make(split, size, rng):
    dataset = make_texts(split, size, rng)
    labels = rng.integers(0, 2, size)
    sequences = [dataset.tokens[a:b] for a, b in spans(dataset)]
    return data.Dataset.from_sequences(sequences, labels, split=split, **TEXT)

  scores = linear.words(splits_of(make))
  assert scores["test"] < 0.75


def spans(dataset, suffix=""):
  offsets = getattr(dataset, "offsets" + suffix).tolist()
  return zip(offsets, offsets[1:], strict=False)


def test_cosine():
  scores = linear.cosine(splits_of(make_pairs))
  assert min(scores.values()) > 0.9
  (line,) = linear.describe(splits_of(make_pairs))
  assert line.startswith("accuracy of tf-idf cosine: train ")


def hashed(dataset, columns):
  sequences = [
    [hash_words(dataset.tokens[a:b].tobytes(), 200) for a, b in spans(dataset)],
    dataset.labels,
  ]
  if columns == 2:
    second = [dataset.tokens_2[a:b] for a, b in spans(dataset, "_2")]
    sequences.append([hash_words(t.tobytes(), 200) for t in second])
  facts = TEXT | {"tokenizer": "words", "vocab_size": VOCAB_SIZE, "id_shift": 0}
  return data.Dataset.from_sequences(*sequences, split=dataset.split, **facts)


@pytest.mark.parametrize("make, columns", [(make_texts, 1), (make_pairs, 2)])
def test_hashed_words_do_as_well(make, columns):
  splits = splits_of(make)
  (line,) = linear.describe(splits)
  hashes = {split: hashed(d, columns) for split, d in splits.items()}
  (other,) = linear.describe(hashes)
  name, scores = line.split(": train")
  assert other.startswith(name)
  scores, others = (x.split()[-1] for x in (scores, other))
  assert float(others) > float(scores) - 0.05


def test_a_high_cosine_means_label_1():
  splits = splits_of(make_pairs)
  flipped = {
    split: data.Dataset.from_sequences(
      [d.tokens[a:b] for a, b in spans(d)],
      1 - d.labels,
      [d.tokens_2[a:b] for a, b in spans(d, "_2")],
      split=split,
      **TEXT,
    )
    for split, d in splits.items()
  }
  # Where it means label 0, one label throughout is the best that there is.
  assert linear.cosine(flipped)["train"] == pytest.approx(0.5, abs=0.05)


def test_pixels(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert command.main(["check", "digits", "--cache_dir=c", "--linear"]) == 0
  line = "accuracy of logistic regression on pixels: train "
  (found,) = [x for x in capsys.readouterr().out.splitlines() if line in x]
  assert float(found.split()[-1]) > 0.9


def test_other_tasks(make_toy):
  splits = {split: make_toy() for split in data.SPLITS}
  assert list(linear.describe(splits)) == [
    "no linear model for the tokenizer 'ids'"
  ]
