"""Our generated tasks as data sets of TensorFlow Datasets.

  >>> from spectraformer_jax.data import tfds_builders
  >>> tfds_builders.LraListops.name, tfds_builders.PathfinderSynthetic.name
  ('lra_listops', 'pathfinder_synthetic')

``tfds_builders.LraListops(data_dir=...).download_and_prepare()`` draws the task
through the token cache and writes it in the array_record format, which is read
and written without TensorFlow; nothing is downloaded. Once this module is
imported, ``tfds.data_source("lra_listops", split="train")`` works as well. It
is not imported by :mod:`spectraformer_jax.data`.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from spectraformer_jax.data.registry import build_source, load
from spectraformer_jax.data.source import SPLITS


@dataclasses.dataclass(kw_only=True)
class TaskConfig(tfds.core.BuilderConfig):
  """A variant of a task.

  Attributes:
    options: of the task, with ``seed``; they are kept in the metadata.
  """

  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _TaskBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes a task, example by example."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [TaskConfig(name="full", description="The default task.")]

  def __init__(
    self,
    *,
    file_format: str = "array_record",
    cache_dir: str | os.PathLike | None = None,
    **kwargs: Any,
  ):
    """Takes the arguments of every builder.

    Args:
      file_format: of the files; TFRecord, the usual default, needs TensorFlow.
      cache_dir: root of the token cache that the task is built in.
      **kwargs: see ``tfds.core.DatasetBuilder``; a `config` of your own is a
        :class:`TaskConfig` with another name.
    """
    self._cache_dir = cache_dir
    super().__init__(file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    """Features, and the facts that the token cache would keep."""
    options = self.builder_config.options
    facts = build_source(self.TASK, options, self._cache_dir).facts()
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{facts['name']} ({facts['provenance']}). {self.__doc__}",
      homepage=self.HOMEPAGE,
      features=tfds.features.FeaturesDict(
        self._features(facts["length"])
        | {"label": tfds.features.ClassLabel(num_classes=facts["num_classes"])}
      ),
      metadata=tfds.core.MetadataDict(facts=facts),
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    """One generator per split; nothing is downloaded."""
    del dl_manager
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    """Number and content of each example."""
    options = {"seed": 0, **self.builder_config.options}
    dataset = load(self.TASK, split, cache_dir=self._cache_dir, **options)
    (field,) = self._features(dataset.length)
    shape = self.info.features[field].shape
    for i in range(len(dataset)):
      example = dataset[i]
      tokens = example["tokens"].astype(np.uint8)
      if None not in shape:
        tokens = tokens.reshape(shape)
      yield i, {field: tokens, "label": example["label"]}


class LraListops(_TaskBuilder):
  """ListOps, drawn; ids as in ``docs/data.md``, closing brackets kept."""

  name = "lra_listops"
  TASK = "listops"
  HOMEPAGE = "https://github.com/google-research/long-range-arena"

  def _features(self, length: int) -> dict[str, Any]:
    """The ids, without padding."""
    del length
    return {"tokens": tfds.features.Tensor(shape=(None,), dtype=np.uint8)}


class PathfinderSynthetic(_TaskBuilder):
  """Pathfinder images, drawn; plain pixels, since pictures need an encoder."""

  name = "pathfinder_synthetic"
  TASK = "pathfinder_synthetic"
  HOMEPAGE = "https://github.com/drewlinsley/pathfinder"

  def _features(self, length: int) -> dict[str, Any]:
    """The gray image."""
    side = math.isqrt(length)
    shape = (side, side, 1)
    return {"image": tfds.features.Tensor(shape=shape, dtype=np.uint8)}
