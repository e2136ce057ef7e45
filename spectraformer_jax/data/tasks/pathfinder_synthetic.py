"""Draws Pathfinder pictures; needs no files of Long Range Arena.

The pictures follow the rules of the public generator and the sizes of Long
Range Arena, but are other pictures: results on them are not results on
``pathfinder``.

Source: Kim et al., "Disentangling neural mechanisms for perceptual grouping",
2020; Tay et al., "Long Range Arena", 2021, sections 2.2.5 and 2.2.6.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from spectraformer_jax.data.generators import pathfinder as generator
from spectraformer_jax.data.generators.pathfinder_shapes import SETTINGS
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import SPLITS, ReportProgress, Source
from spectraformer_jax.data.writer import Writer
from spectraformer_jax.registry import check_choice, check_int
from spectraformer_jax.seeds import make_generator

DIFFICULTIES = {6: "easy", 9: "intermediate", 14: "hard"}

_PUBLISHED = {
  "side": 32,
  "bars": 14,
  "seeding": "upstream",
  "num_train": 160_000,
  "num_dev": 20_000,
  "num_test": 20_000,
}


@TASKS.register("pathfinder_synthetic")
def pathfinder_synthetic(
  *,
  seed: int = 0,
  side: int = _PUBLISHED["side"],
  bars: int = _PUBLISHED["bars"],
  seeding: str = _PUBLISHED["seeding"],
  num_train: int = _PUBLISHED["num_train"],
  num_dev: int = _PUBLISHED["num_dev"],
  num_test: int = _PUBLISHED["num_test"],
) -> Source:
  """Returns the task. Its name shows where it differs from Long Range Arena.

  Args:
    seed: seed of the pictures.
    side: width and height of the pictures: 32 (as Pathfinder), 64 or 128 (as
      Path-X).
    bars: number of bars of each long snake: 6, 9 or 14 (easy, intermediate,
      hard).
    seeding: ``"upstream"`` starts snakes in the directions in which the public
      generator does; ``"any"`` in all directions, which makes fuller pictures.
    num_train: number of training pictures.
    num_dev: number of dev pictures.
    num_test: number of test pictures.

  Raises:
    ValueError: if an option is unknown or out of range.

  Example:
    >>> pathfinder_synthetic(side=64, num_train=1000).name
    'pathfinder_synthetic-side64-num_train1000'
  """
  check_choice("side", side, SETTINGS)
  check_choice("bars", bars, DIFFICULTIES)
  check_choice("seeding", seeding, generator.SEEDINGS)
  options = {
    "side": int(side),
    "bars": int(bars),
    "seeding": seeding,
    "num_train": check_int("num_train", num_train, 1),
    "num_dev": check_int("num_dev", num_dev, 1),
    "num_test": check_int("num_test", num_test, 1),
  }
  changes = [f"-{k}{v}" for k, v in options.items() if v != _PUBLISHED[k]]
  settings = SETTINGS[side]

  def write(writers: Mapping[str, Writer], progress: ReportProgress) -> None:
    sizes = {split: options[f"num_{split}"] for split in SPLITS}
    done = 0
    for index, split in enumerate(SPLITS):
      rng = make_generator(seed, index)
      writer, wanted = writers[split], sizes[split]
      for batch in generator.sample(rng, settings, bars=bars, seeding=seeding):
        pixels = batch.pixels[: wanted - writer.num_examples]
        lengths = np.full(len(pixels), side * side)
        writer.append(pixels.ravel(), lengths, batch.labels[: len(pixels)])
        done += len(pixels)
        progress(done, sum(sizes.values()))
        if writer.num_examples == wanted:
          break

  return Source(
    name="pathfinder_synthetic" + "".join(changes),
    tokenizer="pixels",
    provenance="generated",
    vocab_size=256,
    num_classes=2,
    length=side * side,
    settings={
      "seed": seed,
      "generator": f"pathfinder_generator {generator.VERSION}",
      **dataclasses.asdict(settings),
      **options,
    },
    write=write,
  )
