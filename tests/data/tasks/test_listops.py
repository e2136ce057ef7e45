import numpy as np
import pytest

from spectraformer_jax import data
from spectraformer_jax.data.formats.listops_text import CLOSE, encode, evaluate
from spectraformer_jax.data.generators.listops import Expressions

SMALL = dict(min_len=10, max_len=64, num_train=1000, num_dev=100, num_test=100)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache")
  return lambda split, **options: data.load(
    "listops", split, cache_dir=folder, **SMALL | options
  )


def rows(dataset):
  return [example["tokens"].tolist() for example in dataset]


def test_published_form_is_the_default():
  source = data.TASKS.build("listops")
  assert source.name == "listops"
  assert (source.length, source.vocab_size, source.num_classes) == (
    2000,
    32,
    10,
  )
  settings = source.settings
  assert (settings["num_train"], settings["num_dev"]) == (96_000, 2_000)
  assert (settings["num_test"], settings["max_depth"]) == (2_000, 10)


def test_departures_show_in_name_and_metadata(load):
  train = load("train")
  assert train.name == (
    "listops-min_len10-max_len64-num_train1000-num_dev100-num_test100"
  )
  assert train.settings["max_len"] == train.length == 64
  assert (train.tokenizer, train.provenance) == ("full", "generated")


def test_sizes_values_and_window(load):
  for split, size in zip(data.SPLITS, (1000, 100, 100), strict=True):
    dataset = load(split)
    assert len(dataset) == size
    for example in dataset:
      assert evaluate(example["tokens"]) == example["label"]
      assert 10 < len(example["tokens"]) < 64


def test_no_sequence_occurs_twice(load):
  # A window this narrow makes repeats certain: 800 sequences of length 4 or 5
  # out of 400 * 11.
  options = dict(min_len=3, max_len=6, num_train=600, num_dev=100, num_test=100)
  for tokenizer in ("full", "no_close"):
    everything = [
      tuple(row)
      for split in data.SPLITS
      for row in rows(load(split, tokenizer=tokenizer, **options))
    ]
    assert len(set(everything)) == len(everything) == 800


def test_sequences_that_differ_in_brackets_alone_are_repeats(
  tmp_path, monkeypatch
):
  texts = [
    "[SM [MAX 1 2 ] 3 4 ]",
    "[SM [MAX 1 2 3 ] 4 ]",
    "[SM 1 2 ]",
    "[SM 2 1 ]",
  ]
  sequences = [encode(text) for text in texts]
  batch = Expressions(
    np.concatenate(sequences),
    np.array([len(sequence) for sequence in sequences], np.int32),
    np.array([evaluate(sequence) for sequence in sequences], np.uint8),
  )
  monkeypatch.setattr(
    data.listops.generator, "sample", lambda rng, **window: iter([batch])
  )
  options = dict(num_train=1, num_dev=1, num_test=1, cache_dir=tmp_path)
  kept = [rows(data.load("listops", s, **options)) for s in data.SPLITS]
  assert kept == [[sequences[i].tolist()] for i in (0, 2, 3)]


def test_seed_and_split_decide_the_draw(load, tmp_path):
  again = data.load("listops", "dev", cache_dir=tmp_path, **SMALL)
  assert again.fingerprint == load("dev").fingerprint
  assert rows(load("dev", seed=1)) != rows(load("dev"))
  # Each split has a stream of its own, so sizes of others do not matter, and a
  # smaller one is the start of a larger.
  assert rows(load("train", num_train=300)) == rows(load("train"))[:300]
  assert rows(load("dev", num_train=300)) == rows(load("dev"))


def test_the_draw_is_the_one_of_the_first_release(load):
  """A change here needs a new generator VERSION: caches and results change."""
  assert load("train").fingerprint == "4a2fe6a3b1b2cfc65c1ca51416056386"


def test_no_close_drops_brackets_and_nothing_else(load):
  full, bare = load("dev"), load("dev", tokenizer="no_close")
  assert bare.tokenizer == "no_close"
  assert rows(bare) == [[t for t in row if t != CLOSE] for row in rows(full)]
  assert bare.labels.tolist() == full.labels.tolist()
  assert bare.length == full.length


def test_baselines_are_those_of_the_split(load):
  train, test = load("train"), load("test")
  labels = np.bincount(train.labels, minlength=10)
  roots = {}
  for example in train:
    roots.setdefault(example["tokens"][0], []).append(example["label"])
  best = {root: np.bincount(seen).argmax() for root, seen in roots.items()}
  for dataset in (train, test):
    majority = np.mean([e["label"] == labels.argmax() for e in dataset])
    by_root = np.mean([e["label"] == best[e["tokens"][0]] for e in dataset])
    assert dataset.baselines == {
      "majority label": pytest.approx(majority),
      "root operator only": pytest.approx(by_root),
    }
  assert data.listops.REFERENCE_BASELINES.keys() == test.baselines.keys()


def test_baselines_of_the_published_form(tmp_path):
  options = dict(num_train=16_000, num_dev=1, num_test=4_000)
  test = data.load("listops", "test", cache_dir=tmp_path, **options)
  # One standard error is 0.0076 on 4,000 and 0.0059 for the majority.
  assert abs(test.baselines["root operator only"] - 0.362) < 4 * 0.0076
  assert abs(test.baselines["majority label"] - 0.170) < 4 * 0.0059


def test_progress_reaches_the_total(tmp_path):
  calls = []
  data.load(
    "listops",
    "dev",
    cache_dir=tmp_path,
    progress=lambda done, total: calls.append((done, total)),
    **SMALL,
  )
  assert [total for _, total in calls] == [1200] * len(calls)
  done = [done for done, _ in calls]
  assert done == sorted(done) and done[-1] == 1200


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(tokenizer="noclose"), "got 'noclose'. Did you mean 'no_close'"),
    (dict(min_len=0), "min_len must be an integer >= 1, got 0"),
    (dict(max_len=11), "max_len must be an integer >= 12, got 11"),
    (dict(max_depth=1), "max_depth must be an integer >= 2, got 1"),
    (dict(num_train=0), "num_train must be an integer >= 1, got 0"),
    (dict(num_dev=1.5), "num_dev must be an integer >= 1, got 1.5"),
    (dict(num_test="9"), "num_test must be an integer >= 1, got '9'"),
    (dict(num_valid=9), "no option 'num_valid'. Did you mean"),
    (
      dict(min_len=3, max_len=5),
      "min_len=3, max_len=5, max_depth=10 must leave room for 1200 different "
      "sequences, found 400",
    ),
  ],
)
def test_errors(load, options, message):
  with pytest.raises(ValueError, match=message) as caught:
    load("train", **options)
  assert "\n" not in str(caught.value)
