"""Folders of TensorFlow Datasets, made up and small."""

import json

import numpy as np
import tensorflow_datasets as tfds

from tests.data import made_up

IMAGE = "tensorflow_datasets.core.features.image_feature.Image"


def prepare(folder, name, features, examples, version="1.0.0", config=None):
  """Writes examples by split as a data set of that name; its version folder."""

  class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(version)
    BUILDER_CONFIGS = (
      [tfds.core.BuilderConfig(name=config, description="x")] if config else []
    )

    def _info(self):
      dictionary = tfds.features.FeaturesDict(features)
      return tfds.core.DatasetInfo(builder=self, features=dictionary)

    def _split_generators(self, dl_manager):
      return {split: enumerate(rows) for split, rows in examples.items()}

    def _generate_examples(self):
      raise NotImplementedError

  Builder.name = name
  builder = Builder(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return folder / builder.info.full_name


def write_imdb(folder, count=60):
  features = {
    "text": tfds.features.Text(),
    "label": tfds.features.ClassLabel(names=["neg", "pos"]),
  }
  rows = lambda split: [
    {"text": f" {split} {i} é\n", "label": i % 2} for i in range(count)
  ]
  splits = ("train", "test", "unsupervised")
  examples = {split: rows(split) for split in splits}
  return prepare(
    folder, "imdb_reviews", features, examples, config="plain_text"
  )


def write_images(folder, name, images, labels, version="1.0.0"):
  """Images as TensorFlow would write them: the bytes of a picture.

  Without TensorFlow the feature cannot be written, so that texts are, and the
  description is changed afterwards.
  """
  features = {
    "image": tfds.features.Text(),
    "label": tfds.features.ClassLabel(num_classes=10),
  }
  examples = {
    split: [
      {"image": made_up.png(image), "label": label}
      for image, label in zip(images[split], labels[split], strict=True)
    ]
    for split in images
  }
  target = prepare(folder, name, features, examples, version)
  path = target / "features.json"
  description = json.loads(path.read_text())
  description["featuresDict"]["features"]["image"] = {
    "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}},
    "pythonClassName": IMAGE,
  }
  path.write_text(json.dumps(description))
  return target


def say_tfrecord(folder):
  """Changes the description of a folder to the usual format."""
  path = folder / "dataset_info.json"
  path.write_text(path.read_text().replace("array_record", "tfrecord"))


def write_cifar(folder, count=10):
  """CIFAR-10 with as many images for testing as a fifth of those to train."""
  images, labels = made_up.cifar_images(count, 0)
  colour = np.moveaxis(images.reshape(-1, 3, 32, 32), 1, -1)
  cut = count * 4 // 5
  return write_images(
    folder,
    "cifar10",
    {"train": colour[:cut], "test": colour[cut:]},
    {"train": labels[:cut].tolist(), "test": labels[cut:].tolist()},
    version="3.0.2",
  )
