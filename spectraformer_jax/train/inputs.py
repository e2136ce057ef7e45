"""The data of a run, and its batches."""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from spectraformer_jax import data
from spectraformer_jax.train.config import Config
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.run.progress import Interval


def load_data(
  config: Config, splits: Sequence[str] = data.SPLITS
) -> dict[str, data.Dataset]:
  """Loads splits of the task; the first call builds the token cache."""
  task = config.task
  interval = Interval(config.logging.interval_seconds)

  def progress(done: int, total: int) -> None:
    if interval.is_over():
      logging.info("building %s: %d of %d examples", task.name, done, total)

  return {
    split: data.load(
      task.name,
      split,
      cache_dir=task.cache_dir,
      seed=task.seed,
      tokenizer=task.tokenizer,
      progress=progress,
      **task.kwargs,
    )
    for split in splits
  }


def make_batches(
  config: Config,
  dataset: data.Dataset,
  *,
  train: bool,
  state: Mapping[str, Any] | None = None,
) -> data.Batches:
  """Makes this process's batches of a split; `state` is where they resume."""
  return data.Batches(
    dataset,
    config.train.batch_size if train else config.eval.batch_size,
    seed=config.train.seed,
    train=train,
    state=state,
    pad_to_multiple=config.task.pad_to_multiple,
    buckets=config.task.buckets,
    **parallel.host_index_and_count(),
  )
