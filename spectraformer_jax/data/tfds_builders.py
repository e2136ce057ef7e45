"""Offers the generated tasks as data sets of TensorFlow Datasets.

  >>> from spectraformer_jax.data import tfds_builders
  >>> tfds_builders.LraListops.name, tfds_builders.PathfinderSynthetic.name
  ('lra_listops', 'pathfinder_synthetic')

``tfds_builders.LraListops(data_dir=...).download_and_prepare()`` draws the task
into the token cache and writes it from there in the array_record format, which
is read and written without TensorFlow; nothing is downloaded. Once this module
is imported, ``tfds.data_source("lra_listops", split="train")`` works as well.
:mod:`spectraformer_jax.data` does not import this module.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from typing_extensions import override

from spectraformer_jax.data.registry import build_source, load
from spectraformer_jax.data.source import SPLITS


@dataclasses.dataclass(kw_only=True)
class TaskConfig(tfds.core.BuilderConfig):
  """Holds the options of a task.

  Attributes:
    options: options of the task, including ``seed``; kept in the metadata.
  """

  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _TaskBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Builds a data set from the examples of a task."""

  TASK: str
  HOMEPAGE: str
  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [TaskConfig(name="full", description="The default task.")]

  def __init__(
    self,
    *,
    file_format: str = "array_record",
    cache_dir: str | os.PathLike | None = None,
    **kwargs: Any,
  ) -> None:
    """Takes the arguments of every builder.

    Args:
      file_format: format of the files; TFRecord, the default of TensorFlow
        Datasets, needs TensorFlow.
      cache_dir: root of the token cache that the task is built in.
      **kwargs: see ``tfds.core.DatasetBuilder``. A `config` of your own must be
        a :class:`TaskConfig` with a name other than ``"full"``.
    """
    self._cache_dir = cache_dir
    super().__init__(file_format=file_format, **kwargs)

  def _options(self) -> Mapping[str, Any]:
    """Returns the options of the task."""
    config = self.builder_config
    return config.options if isinstance(config, TaskConfig) else {}

  def _field(self, length: int) -> tuple[str, tuple[int | None, ...]]:
    """Returns the name and the shape of the feature that holds the tokens."""
    raise NotImplementedError

  @override
  def _info(self) -> tfds.core.DatasetInfo:
    """Describes the features; the metadata hold the facts of the task."""
    facts = build_source(self.TASK, self._options(), self._cache_dir).facts()
    name, shape = self._field(facts["length"])
    classes = tfds.features.ClassLabel(num_classes=facts["num_classes"])
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{facts['name']} ({facts['provenance']}). {self.__doc__}",
      homepage=self.HOMEPAGE,
      features=tfds.features.FeaturesDict(
        {
          name: tfds.features.Tensor(shape=shape, dtype=np.uint8),
          "label": classes,
        }
      ),
      metadata=tfds.core.MetadataDict(facts=facts),
    )

  @override
  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
    """Returns one generator per split; nothing is downloaded."""
    del dl_manager
    return {split: self._generate_examples(split) for split in SPLITS}

  @override
  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    """Yields the number and the features of each example."""
    options = {"seed": 0, **self._options()}
    dataset = load(self.TASK, split, cache_dir=self._cache_dir, **options)
    name, shape = self._field(dataset.length)
    for i in range(len(dataset)):
      example = dataset[i]
      tokens = example["tokens"].astype(np.uint8)
      if len(shape) > 1:
        tokens = tokens.reshape(shape)
      yield i, {name: tokens, "label": example["label"]}


class LraListops(_TaskBuilder):
  """ListOps, drawn; ids as in ``docs/data.md``, with closing brackets."""

  name = "lra_listops"
  TASK = "listops"
  HOMEPAGE = "https://github.com/google-research/long-range-arena"

  @override
  def _field(self, length: int) -> tuple[str, tuple[int | None, ...]]:
    return "tokens", (None,)


class PathfinderSynthetic(_TaskBuilder):
  """Pathfinder images, drawn; stored as pixels, without an image encoder."""

  name = "pathfinder_synthetic"
  TASK = "pathfinder_synthetic"
  HOMEPAGE = "https://github.com/drewlinsley/pathfinder"

  @override
  def _field(self, length: int) -> tuple[str, tuple[int | None, ...]]:
    side = math.isqrt(length)
    return "image", (side, side, 1)
