"""A run from its config to its report, in the order in which things happen."""

import dataclasses
import functools
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from spectraformer_jax import data, nn
from spectraformer_jax.train import (
  models,
  optim,
  parallel,
  report,
  state,
  steps,
)
from spectraformer_jax.train import workdir as files
from spectraformer_jax.train.checkpoints import Checkpointer
from spectraformer_jax.train.config import pair_name, to_dict, validate
from spectraformer_jax.train.meters import Clock, Record, Window
from spectraformer_jax.train.progress import Progress
from spectraformer_jax.train.writers import MetricWriter, read_rows, result_row


def train_and_evaluate(
  config: ConfigDict, workdir: Path | str, *, command: str | None = None
) -> dict[str, Any]:
  """Trains a classifier, or goes on training it, and evaluates it.

  A second call with the same config and workdir goes on from the last
  checkpoint, bit for bit on the same devices; if the run has finished it only
  returns the result again.

  Args:
    config: all sections of `config.default_config`.
    workdir: made if it is not there. See docs/training.md for its contents.
    command: what to type to get this run, for its report.

  Returns:
    The last row of metrics.jsonl: "test/accuracy" and more.

  Raises:
    ValueError: before anything is compiled: a key or value of the config, a
      name, a batch size that the devices cannot share, or a workdir that holds
      another config.
  """
  workdir = Path(workdir)

  # 1. Whatever can be wrong is found before anything is compiled.
  validate(config)
  feature_map = models.make_feature_map(config)
  for section in ("train", "eval"):
    parallel.check_batch_size(
      f"config.{section}.batch_size", config[section].batch_size
    )
  files.check_config(workdir, to_dict(config))
  finished = result_row(read_rows(workdir))
  if finished:
    logging.info("%s holds a finished run.", workdir)
    report.write_report(workdir)
    return finished

  # 2. Data and model.
  datasets = load_data(config)
  facts = {split: describe(dataset) for split, dataset in datasets.items()}
  make_batches = functools.partial(
    data.Batches,
    seed=config.train.seed,
    pad_to_multiple=config.task.pad_to_multiple,
    buckets=config.task.buckets,
    **parallel.hosts(),
  )
  first = make_batches(datasets["train"], config.train.batch_size, train=True)
  model = models.make_model(config, feature_map, first)
  files.check_data(workdir, facts)
  files.write_config(workdir, to_dict(config), facts, command)

  # 3. The state: new, or that of the last checkpoint.
  num_steps = config.train.num_steps
  keys = state.run_keys(config.train.seed)
  schedule = optim.learning_rate(config.optim, num_steps)
  tx = optim.make_optimizer(config.optim, num_steps)
  train_state = state.create(model, feature_map, tx, keys)
  sizes = state.sizes(train_state)
  checkpointer = Checkpointer(
    workdir / files.CHECKPOINTS, keep=config.checkpoint.keep
  )
  record = Record(data=first.state())
  if checkpointer.steps():
    newest = checkpointer.steps()[-1]
    train_state, stored = checkpointer.restore(newest, train_state)
    record = Record(**stored)
  start = int(train_state.step)
  train_state = parallel.replicate(train_state)

  # 4. Step functions.
  train_step = parallel.DataParallelStep(
    functools.partial(steps.train_step, apply_fn=model.apply, tx=tx),
    donate_state=True,
  )
  eval_step = parallel.DataParallelStep(
    functools.partial(steps.eval_step, apply_fn=model.apply)
  )
  interval = config.feature_map.redraw_interval if feature_map else 0
  redraw = parallel.on_one_device(
    functools.partial(
      steps.redraw_step,
      redraw_fn=functools.partial(nn.redraw, feature_map),
      interval=interval,
    )
  )
  evaluate = functools.partial(
    evaluate_split, eval_step, make_batches, config.eval.batch_size
  )

  # 5. Training.
  with (
    checkpointer,
    data.Prefetch(
      make_batches(
        datasets["train"],
        config.train.batch_size,
        train=True,
        state=record.data,
      )
    ) as batches,
    MetricWriter(
      workdir, start_step=start, tensorboard=config.logging.tensorboard
    ) as writer,
    Progress(
      num_steps,
      start,
      interval_seconds=config.logging.interval_seconds,
      bar=config.logging.progress_bar,
    ) as progress,
  ):
    for line in describe_run(config, workdir, facts, sizes, start):
      progress.line(line)
    window = Window(record.window)
    clock = Clock(record, train_step, eval_step)
    for step in range(start, num_steps):
      if interval and step and step % interval == 0:
        train_state = redraw(train_state, keys.redraw_rng)
      batch = next(batches)
      train_state, sums = train_step(train_state, batch, keys.dropout_rng)
      window.add(sums)
      done = step + 1
      progress.step(done)

      last = done == num_steps
      log_now = last or done % config.logging.every == 0
      evaluate_now = last or done % config.eval.every == 0
      save_now = last or done % config.checkpoint.every == 0
      if not (log_now or evaluate_now or save_now):
        continue
      window.collect()
      clock.stop()
      if log_now:
        values = {f"train/{name}": x for name, x in window.means().items()}
        values["train/learning_rate"] = float(schedule(step))
        values["train/examples_per_second"] = clock.rate(window.weight)
        window.reset()
        writer.write(done, values)
        progress.values(done, values)
      if evaluate_now:
        dev = evaluate(train_state, datasets["dev"])
        values = {f"dev/{name}": x for name, x in dev.items()}
        writer.write(done, values)
        progress.values(done, values)
        record.dev = {"step": done, **dev}
        if is_better(record.dev, record.best):
          record.best, save_now = record.dev, True
        progress.line(describe_dev(record))
      if save_now:
        writer.sync()
        record.data, record.window = batches.state(), window.sums
        checkpointer.save(
          parallel.to_host(train_state),
          dataclasses.asdict(record),
          best_step=record.best and record.best["step"],
        )
      clock.start()

    # 6. Test accuracy of the last and of the best-dev parameters.
    test_last = test_best = evaluate(train_state, datasets["test"])
    if record.best["step"] != num_steps:
      best_state, _ = checkpointer.restore(record.best["step"], train_state)
      test_best = evaluate(parallel.replicate(best_state), datasets["test"])
    outcome = {
      **{f"test/{name}_best": x for name, x in test_best.items()},
      **{f"test/{name}_last": x for name, x in test_last.items()},
      **describe_result(config, datasets["test"], record),
      **sizes,
    }
    writer.write(num_steps, {"test/accuracy": test_best["accuracy"], **outcome})
  report.write_report(workdir)
  return result_row(read_rows(workdir))


def load_data(config: ConfigDict) -> dict[str, data.Dataset]:
  """All splits of the task, from the cache or built into it."""
  task = config.task
  last_line = time.monotonic()

  def progress(done: int, total: int) -> None:
    nonlocal last_line
    if time.monotonic() - last_line > config.logging.interval_seconds:
      last_line = time.monotonic()
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
    for split in data.SPLITS
  }


def evaluate_split(
  eval_step: Callable[..., steps.Sums],
  make_batches: Callable[..., data.Batches],
  batch_size: int,
  train_state: state.TrainState,
  dataset: data.Dataset,
) -> dict[str, float]:
  """Mean loss and accuracy over every example of a split, each once."""
  window = Window()
  with data.Prefetch(make_batches(dataset, batch_size, train=False)) as batches:
    for batch in batches:
      window.add(eval_step(train_state, batch))
  window.collect()
  return window.means()


def is_better(
  dev: Mapping[str, float], best: Mapping[str, float] | None
) -> bool:
  """Higher dev accuracy; among equals, lower dev loss.

  Example:
    >>> dev = {"accuracy": 0.5, "loss": 1.0}
    >>> is_better(dev, None), is_better(dev, dev)
    (True, False)
  """
  rank = lambda x: (x["accuracy"], -x["loss"])
  return best is None or rank(dev) > rank(best)


def describe(dataset: data.Dataset) -> dict[str, Any]:
  """Facts about a split for config.json."""
  return {
    **dataset.facts(),
    "num_examples": dataset.num_examples,
    "fingerprint": dataset.fingerprint,
    "baselines": dict(dataset.baselines),
  }


def describe_run(
  config: ConfigDict,
  workdir: Path,
  facts: Mapping[str, Mapping[str, Any]],
  sizes: Mapping[str, int],
  start: int,
) -> list[str]:
  """Lines that say what is about to happen."""
  train = facts["train"]
  counts = ", ".join(f"{f['num_examples']:,} {s}" for s, f in facts.items())
  kinds = parallel.device_kinds()
  begins = f"resumes at step {start}" if start else "starts"
  unused = (
    ""
    if config.model.attention == "spectral"
    else (" (config.feature_map has no effect)")
  )
  return [
    f"data: {train['name']} ({train['provenance']}), {counts}",
    f"model: {pair_name(config)}{unused}, {sizes['parameters']:,} parameters, "
    f"{sizes['projection_size']:,} projection numbers, "
    f"on {len(kinds)} x {kinds[0]}",
    f"workdir: {workdir}, {begins}, {config.train.num_steps} steps of "
    f"{config.train.batch_size}",
  ]


def describe_dev(record: Record) -> str:
  """One line about the last evaluation."""
  dev = record.dev
  mark = "  (best so far)" if record.best is dev else ""
  return (
    f"step {dev['step']}: dev accuracy {dev['accuracy']:.4f}, "
    f"loss {dev['loss']:.4f}{mark}"
  )


def describe_result(
  config: ConfigDict, test: data.Dataset, record: Record
) -> dict[str, Any]:
  """What the last row holds beside test metrics and sizes."""
  batch_size = config.train.batch_size
  speed = config.train.num_steps * batch_size / record.train_seconds
  return {
    "dev/accuracy_best": record.best["accuracy"],
    "dev/accuracy_last": record.dev["accuracy"],
    "best_step": record.best["step"],
    "task": test.name,
    "pair": pair_name(config),
    "provenance": test.provenance,
    "baselines": dict(test.baselines),
    "examples_per_second": speed,
    "step_seconds": batch_size / speed,
    "train_seconds": record.train_seconds,
    "compile_seconds": record.compile_seconds,
    "peak_memory_bytes": peak_process_bytes(),
    "peak_device_bytes": parallel.peak_device_bytes(),
  }


def peak_process_bytes() -> int:
  """The most memory this process has had resident."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024
