"""Our generated tasks as data sets of TensorFlow Datasets."""

import numpy as np
import pytest

from spectraformer_jax import data

tfds = pytest.importorskip("tensorflow_datasets")

from spectraformer_jax.data import tfds_builders  # noqa: E402

OPTIONS = dict(
  min_len=20, max_len=100, num_train=200, num_dev=20, num_test=20, seed=3
)


def contents(dataset):
  return sorted((e["tokens"].tolist(), e["label"]) for e in dataset)


def test_listops_round_trip(tmp_path):
  config = tfds_builders.TaskConfig(name="small", options=OPTIONS)
  builder = tfds_builders.LraListops(
    config=config, data_dir=tmp_path / "tfds", cache_dir=tmp_path / "cache"
  )
  builder.download_and_prepare()
  facts = builder.info.metadata["facts"]
  assert facts["settings"]["seed"] == 3 and facts["provenance"] == "generated"
  for split in data.SPLITS:
    drawn = data.load("listops", split, cache_dir=tmp_path / "cache", **OPTIONS)
    read = data.load(
      "listops",
      split,
      data_dir=tmp_path / "tfds",
      cache_dir=tmp_path / "cache",
      max_len=100,
    )
    assert contents(read) == contents(drawn)
    assert (read.provenance, read.name) == ("tfds", "listops-max_len100-drawn")
    assert read.baselines == drawn.baselines
  source = builder.as_data_source(split="train[:10]")
  assert len(source) == 10 and source[0]["tokens"].dtype == np.uint8


def test_defaults_are_those_of_the_task(tmp_path):
  builder = tfds_builders.LraListops(data_dir=tmp_path)
  facts = builder.info.metadata["facts"]
  wanted = data.TASKS.build("listops", {}).facts()
  assert facts == wanted and facts["name"] == "listops"
  assert builder.info.file_format.value == "array_record"
  assert not list(tmp_path.iterdir())


def test_pathfinder(tmp_path, monkeypatch):
  factories = dict(data.TASKS._factories)
  factories.pop("pathfinder_synthetic", None)
  monkeypatch.setattr(data.TASKS, "_factories", factories)
  pixels = np.random.default_rng(0).integers(0, 256, (12, 16), np.uint8)

  @data.TASKS.register("pathfinder_synthetic")
  def pathfinder_synthetic(*, seed=0):
    def write(writers, progress):
      for i, writer in enumerate(writers.values()):
        rows = pixels[4 * i : 4 * i + 4]
        writer.append(rows.ravel(), [16] * 4, [0, 1, 0, 1])

    return data.Source(
      name="pathfinder_synthetic",
      tokenizer="pixels",
      vocab_size=256,
      num_classes=2,
      length=16,
      write=write,
    )

  builder = tfds_builders.PathfinderSynthetic(
    data_dir=tmp_path / "tfds", cache_dir=tmp_path / "cache"
  )
  builder.download_and_prepare()
  source = builder.as_data_source(split="dev")
  images = {source[i]["image"].tobytes() for i in range(len(source))}
  assert images == {row.tobytes() for row in pixels[4:8]}
  assert source[0]["image"].shape == (4, 4, 1)
