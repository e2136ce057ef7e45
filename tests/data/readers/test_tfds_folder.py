"""Folders of TensorFlow Datasets, written and read without TensorFlow."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from spectraformer_jax import data
from spectraformer_jax.data.formats.grayscale import rgb_to_gray
from spectraformer_jax.data.readers import tfds_folder
from tests.data import made_up

tfds = pytest.importorskip("tensorflow_datasets")
made_up_tfds = pytest.importorskip("tests.data.made_up_tfds")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def load(tmp_path):
  return lambda task, split="train", **options: data.load(
    task, split, data_dir=tmp_path, cache_dir=tmp_path / "cache", **options
  )


def texts(dataset):
  return sorted(
    ((e["tokens"] - 1).astype(np.uint8).tobytes().decode(), e["label"])
    for e in dataset
  )


def test_text(load, tmp_path):
  made_up_tfds.write_imdb(tmp_path)
  train, dev, test = (load("text", split) for split in data.SPLITS)
  wanted = lambda part: sorted((f"{part} {i} é", i % 2) for i in range(60))
  assert sorted(texts(train) + texts(dev)) == wanted("train") and len(dev)
  assert texts(test) == wanted("test")
  assert test.provenance == "tfds" and test.name == "text-dev_holdout"
  assert test.settings["reader"] == "TFDS imdb_reviews 1.0.0"
  assert texts(load("text", "dev", val="lra")) == texts(test)


def test_image_has_the_split_of_long_range_arena(load, tmp_path):
  images, labels = made_up.cifar_images(50, 0)
  colour = np.moveaxis(images.reshape(-1, 3, 32, 32), 1, -1)
  made_up_tfds.write_images(
    tmp_path,
    "cifar10",
    {"train": colour[:40], "test": colour[40:]},
    {"train": labels[:40].tolist(), "test": labels[40:].tolist()},
    version="3.0.2",
  )
  splits = [load("image", split) for split in data.SPLITS]
  assert [len(d) for d in splits] == [36, 4, 10]
  assert splits[0].name == "image" and splits[0].provenance == "tfds"
  made_up.write_cifar_binary(tmp_path / "raw", count=1)
  folder = tmp_path / "cifar10" / "3.0.2"
  source = tfds.builder_from_directory(folder).as_data_source(split="train")
  for i, example in enumerate([*splits[0], *splits[1]]):
    gray = rgb_to_gray(*np.moveaxis(source[i]["image"], 2, 0))
    assert (example["tokens"] == gray.ravel()).all()
    assert example["label"] == source[i]["label"]
  with pytest.raises(ValueError, match="one form of 'image', found CIFAR-10 b"):
    load("image")


def test_pathfinder(load, tmp_path):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (20, 32, 32), np.uint8)
  labels = [i % 2 for i in range(20)]
  made_up_tfds.write_images(
    tmp_path,
    "pathfinder32",
    {"easy": images[:1], "hard": images},
    {"easy": [0], "hard": labels},
  )
  splits = [load("pathfinder", split) for split in data.SPLITS]
  assert [len(d) for d in splits] == [16, 2, 2]
  found = {(e["tokens"].tobytes(), e["label"]) for d in splits for e in d}
  wanted = {(image.tobytes(), i % 2) for i, image in enumerate(images)}
  assert found == wanted  # gray stays what it is
  assert (splits[0].name, splits[0].provenance) == ("pathfinder", "tfds")


@pytest.mark.parametrize(
  ("task", "name", "advice"),
  [
    ("text", "imdb_reviews", "tfds.builder('imdb_reviews', data_dir='"),
    ("image", "cifar10", "file_format='array_record').download_and_prepare()"),
    ("pathfinder", "pathfinder32", "point data_dir at the PNG files"),
    ("pathx", "pathfinder128", "point data_dir at the PNG files"),
    ("listops", "lra_listops", "LraListops of spectraformer_jax.data.tfds_"),
  ],
)
def test_tfrecord_is_explained(load, tmp_path, task, name, advice):
  folder = tmp_path / name / "1.0.0"
  folder.mkdir(parents=True)
  info = {"name": name, "fileFormat": "tfrecord", "version": "1.0.0"}
  (folder / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(ValueError) as caught:
    load(task)
  message = str(caught.value)
  assert "\n" not in message and advice in message
  assert "must be in the format array_record" in message
  assert "found tfrecord" in message and str(folder) in message


def test_array_record_is_taken_before_tfrecord(load, tmp_path):
  folder = made_up_tfds.write_imdb(tmp_path)
  for version in ("0.9.0", "2.0.0"):
    shutil.copytree(folder, folder.parent / version)
    made_up_tfds.say_tfrecord(folder.parent / version)
  assert load("text", "test").settings["reader"] == "TFDS imdb_reviews 1.0.0"


def test_other_folders_are_passed_over(load, tmp_path):
  for i, content in enumerate(('{"name": "mnist"}', "[]", "{", "é")):
    (tmp_path / str(i)).mkdir()
    path = tmp_path / str(i) / "dataset_info.json"
    path.write_text(content, encoding="latin-1")
  with pytest.raises(
    ValueError, match="must hold .*a TFDS folder imdb_reviews"
  ):
    load("text")


def test_without_array_record(load, tmp_path, monkeypatch):
  made_up_tfds.write_imdb(tmp_path)
  monkeypatch.setattr(
    tfds_folder.importlib.util, "find_spec", lambda name: None
  )
  with pytest.raises(ValueError, match="pip install array_record; where"):
    load("text")


def test_wrong_content(load, tmp_path):
  image = np.zeros((1, 16, 32), np.uint8)
  made_up_tfds.write_images(
    tmp_path, "pathfinder32", {"hard": [image[0]] * 10}, {"hard": [0] * 10}
  )
  with pytest.raises(ValueError, match=r"must be 32 x 32 pixels.* \(16, 32\)"):
    load("pathfinder")
  features = {
    "text": tfds.features.Text(),
    "stars": tfds.features.Scalar(np.int64),
  }
  rows = [{"text": "a", "stars": 1}] * 3
  made_up_tfds.prepare(
    tmp_path, "imdb_reviews", features, dict(train=rows, test=rows)
  )
  with pytest.raises(
    ValueError, match=r"must have text and label, got \['star"
  ):
    load("text")


def test_nothing_imports_tensorflow(tmp_path):
  folder = made_up_tfds.write_imdb(tmp_path)
  code = f"""
import sys

class Hidden:
  def __init__(self, finder):
    self.finder = finder
  def find_spec(self, name, *args):
    if name.split(".")[0] == "tensorflow":
      return None
    return self.finder.find_spec(name, *args)
  def __getattr__(self, name):
    return getattr(self.finder, name)

sys.meta_path[:] = map(Hidden, sys.meta_path)
from spectraformer_jax import data
assert "tensorflow_datasets" not in sys.modules
options = dict(data_dir={str(folder)!r}, cache_dir={str(tmp_path / "c")!r})
assert len(data.load("text", "test", **options)) == 60
from spectraformer_jax.data import tfds_builders
small = dict(min_len=20, max_len=60, num_train=20, num_dev=5, num_test=5)
config = tfds_builders.TaskConfig(name="small", options=small)
del options["data_dir"]
tfds_builders.LraListops(
  config=config, data_dir={str(tmp_path / "t")!r}, **options
).download_and_prepare()
options |= dict(data_dir={str(tmp_path / "t")!r}, max_len=60)
assert len(data.load("listops", "train", **options)) == 20
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""
  process = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=100
  )
  assert process.returncode == 0, process.stderr
