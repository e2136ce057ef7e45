"""Tasks from the pickles of other repositories."""

import pickle

import numpy as np
import pytest

from spectraformer_jax import data
from tests.data import made_up

PIXELS = np.arange(1024, dtype=np.int32) % 256


def example(ids, label, length=32, second=None):
  item = {"input_ids_0": made_up.padded(ids, length), "label": np.int32(label)}
  if second is not None:
    item["input_ids_1"] = made_up.padded(second, length)
  return item


EXAMPLES = {
  "listops": [example([3, 17, 5], 7), example([4, 5, 6, 1], 0)],
  "text": [example([98, 196, 170], 1), example([256, 1], 0)],
  "retrieval": [
    example([98, 99], 1, second=[100]),
    example([3], 0, second=[4]),
  ],
  "image": [{"input_ids_0": PIXELS, "label": np.int64(9)}] * 2,
  "pathfinder": [{"input_ids_0": PIXELS * 0, "label": 1}] * 2,
}
STEMS = {
  "listops": ("lra-listops", "listops"),
  "text": ("lra-text", "text"),
  "retrieval": ("lra-retrieval", "retrieval"),
  "image": ("lra-image", "image"),
  "pathfinder": (
    "lra-pathfinder32-curv_contour_length_14",
    "lra-pathfinder",
    "pathfinder32-curv_contour_length_14",
    "pathfinder",
  ),
}


@pytest.fixture
def load(tmp_path):
  return lambda task, split="train", **options: data.load(
    task,
    split,
    data_dir=tmp_path / "lra_processed",
    cache_dir=tmp_path / "cache",
    **options,
  )


@pytest.fixture
def write(tmp_path):
  return lambda stem, examples, **options: made_up.write_pickles(
    tmp_path / "lra_processed", stem, examples, **options
  )


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
  ("task", "stem"), [(task, stem) for task in STEMS for stem in STEMS[task]]
)
def test_examples_are_those_of_the_files(load, write, task, stem, protocol):
  write(stem, EXAMPLES[task], protocol=protocol)
  options = {"val": "lra"} if task == "text" else {}
  for split in data.SPLITS:
    dataset = load(task, split, **options)
    for read, written in zip(dataset, EXAMPLES[task], strict=True):
      for name, old in (("tokens", "input_ids_0"), ("tokens_2", "input_ids_1")):
        if old in written:
          ids = written[old]
          ids = ids if task in ("image", "pathfinder") else np.trim_zeros(ids)
          assert read[name].tolist() == ids.tolist()
      assert read["label"] == written["label"]
  assert dataset.name.endswith("-pickled")
  assert dataset.provenance == "lra-files"


def test_facts(load, write):
  for task in EXAMPLES:
    write(STEMS[task][0], EXAMPLES[task])
  assert load("listops").tokenizer == "pickled_ids"
  assert load("listops").baselines.keys() == {"majority label"}
  assert load("text", val="lra").name == "text-dev_is_test-pickled"
  assert load("retrieval").pair and load("retrieval").vocab_size == 257
  assert load("image").length == load("pathfinder").length == 1024


def test_holdout_ignores_the_pickled_dev(load, write):
  write("lra-text", [example([i + 1, 9], i % 2) for i in range(60)])
  train, dev = load("text"), load("text", "dev")
  assert len(train) + len(dev) == 60 and len(load("text", "test")) == 60


def test_options_that_need_text(load, write):
  write("lra-listops", EXAMPLES["listops"])
  write("lra-retrieval", EXAMPLES["retrieval"])
  with pytest.raises(ValueError, match="whose ids cannot be decoded"):
    load("listops", tokenizer="no_close")
  with pytest.raises(
    ValueError, match="literal='decode' needs AAN pairs as TSV"
  ):
    load("retrieval", literal="decode")


def test_an_image_file_that_was_never_finished(load, write, tmp_path):
  folder = write("lra-image", EXAMPLES["image"])
  train = folder / "lra-image.train.pickle"
  train.write_bytes(train.read_bytes()[:-20])
  with pytest.raises(
    ValueError, match="train.pickle is no complete pickle file"
  ):
    load("image")
  train.unlink()
  with pytest.raises(ValueError, match="repeats the images without end, take"):
    load("image")


@pytest.mark.parametrize(
  ("task", "item", "message"),
  [
    ("text", [1], "example 0: expected a dict with input_ids_0 and label"),
    ("text", {"input_ids_0": PIXELS}, "expected a dict with"),
    ("text", {"label": 1}, "input_ids_0 must be an array of integers"),
    ("text", {"input_ids_0": [1], "label": 1}, "must be an array of integers"),
    ("text", {"input_ids_0": PIXELS * 0.5, "label": 1}, "array of integers"),
    ("text", example([], 1), "must hold ids from 1 to 256, got none"),
    ("text", example([257], 1), "must hold ids from 1 to 256, got 257"),
    ("text", example([5, 0, 5], 1), "must hold ids from 1 to 256, got 0 to 5"),
    ("text", example([5], 2), "the label must be an integer from 0 to 1"),
    ("listops", example([32], 2), "must hold ids from 0 to 31, got 32"),
    ("retrieval", example([5], 1), "input_ids_1 must be an array of integers"),
    ("image", example([5], 1), "must hold 1024 pixels, got 32"),
    ("image", {"input_ids_0": PIXELS - 1, "label": 1}, "got -1 to 254"),
  ],
)
def test_examples_of_another_kind(load, write, task, item, message):
  write(f"lra-{task}", [item])
  with pytest.raises(ValueError, match=message) as caught:
    load(task)
  assert f"lra-{task}.train.pickle example 0" in str(caught.value)
  assert "\n" not in str(caught.value)


class Hostile:
  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    import os

    return os.system, (self.command,)


def test_hostile_files_are_refused_at_the_item(load, write, tmp_path):
  mark = tmp_path / "mark"
  items = [*EXAMPLES["text"], Hostile(f"touch {mark}")]
  write("lra-text", items)
  with pytest.raises(ValueError, match="only numpy arrays and plain values"):
    load("text")
  assert not mark.exists()
  pickle.loads(pickle.dumps(Hostile(f"touch {mark}")))
  assert mark.exists()  # it would have worked
