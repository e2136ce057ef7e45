"""A run from its config to its report, in the order in which things happen."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from spectraformer_jax import data, nn
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn import from_config
from spectraformer_jax.train import pretrained
from spectraformer_jax.train.config import to_dict, validate
from spectraformer_jax.train.devices import hosts, parallel
from spectraformer_jax.train.run import (
  describe,
  nonfinite,
  report,
  run_folder,
  wandb_run,
)
from spectraformer_jax.train.run.lock import workdir_lock
from spectraformer_jax.train.run.meters import Clock, Record, Window
from spectraformer_jax.train.run.nonfinite import SkippedSteps
from spectraformer_jax.train.run.profiler import Profiler
from spectraformer_jax.train.run.progress import Progress
from spectraformer_jax.train.run.selection import is_better, out_of_patience
from spectraformer_jax.train.run.signals import StopSignals
from spectraformer_jax.train.run.storage import Storage
from spectraformer_jax.train.run.writers import (
  MetricWriter,
  finished_result,
  read_rows,
  result_row,
)
from spectraformer_jax.train.step import objectives, optim, state, steps
from spectraformer_jax.typing import Array


def train_and_evaluate(
  config: ConfigDict, workdir: Path | str, *, command: str | None = None
) -> dict[str, Any]:
  """Trains a model, or goes on training it, and evaluates it.

  A second call with the same config and workdir goes on from the last
  checkpoint, bit for bit on the same devices; if the run has finished it only
  returns the result again. SIGTERM and SIGINT end a run after the step that is
  under way, with its state saved.

  Args:
    config: all sections of `config.default_config`.
    workdir: made if it is not there. See docs/training.md for its contents.
    command: what to type to get this run, for its report.

  Returns:
    The last row of metrics.jsonl: "test/accuracy" and more; "diverged" says why
    the result is no good, None if it is.

  Raises:
    ValueError: before anything is compiled: a key or value of the config, a
      name, a batch size that the devices cannot share, or a workdir that holds
      another config or is in use.
    KeyboardInterrupt: a signal has ended the run.
    NonFiniteError: `train.max_skipped_steps` steps in a row had a loss or
      gradient that is not finite.
    OSError: files could not be written, as when the disk is full.
  """
  workdir = Path(workdir)

  # 1. Whatever can be wrong is found before anything is compiled.
  validate(config)
  hosts.from_main(lambda: run_folder.check_folder(workdir))
  wandb_run.load(config.logging.wandb)
  feature_map = from_config.make_feature_map(config)
  optim.check_feature_map_lr(config.optim, feature_map)
  parallel.check_batch_size(
    "config.train.batch_size", config.train.batch_size, config.train.accumulate
  )
  parallel.check_batch_size("config.eval.batch_size", config.eval.batch_size)
  finished = hosts.from_main(lambda: find_result(workdir, config))
  if finished:
    logging.info("%s holds a finished run.", workdir)
    return finished

  if source := config.model.init_from:
    hosts.from_main(lambda: pretrained.check_source(workdir, source))

  # 2. Data and model.
  datasets = load_data(config)
  objectives.check_lengths(config.train.objective, datasets)
  facts = {
    split: describe.split(dataset) for split, dataset in datasets.items()
  }
  make_batches = functools.partial(
    data.Batches,
    seed=config.train.seed,
    pad_to_multiple=config.task.pad_to_multiple,
    buckets=config.task.buckets,
    **parallel.hosts(),
  )
  # Its own checks: of the batch size and the buckets.
  make_batches(datasets["train"], config.train.batch_size, train=True)
  model = from_config.make_model(config, feature_map, facts["train"])
  if hasattr(model, "batch_axis"):
    model = model.clone(batch_axis=parallel.AXIS)
  with contextlib.ExitStack() as held:

    def claim_workdir():
      held.enter_context(workdir_lock(workdir))
      # Again: another run may have been at work here since.
      if found := find_result(workdir, config):
        return found
      run_folder.check_data(workdir, facts)
      run_folder.write_config(workdir, to_dict(config), facts, command)
      return None

    finished = hosts.from_main(claim_workdir)
    if finished:
      logging.info("%s holds a finished run by now.", workdir)
      return finished
    train(config, workdir, feature_map, model, datasets, facts, make_batches)

    def conclude():
      report.write_report(workdir)
      return result_row(read_rows(workdir))

    return hosts.from_main(conclude)


def train(
  config: ConfigDict,
  workdir: Path,
  feature_map: FeatureMap | None,
  model: from_config.Model,
  datasets: Mapping[str, data.Dataset],
  facts: Mapping[str, Mapping[str, Any]],
  make_batches: Callable[..., data.Batches],
) -> None:
  """Steps 3 to 6 of a run: from its initial or last state to its result."""
  # 3. The state: new, or that of the last checkpoint.
  num_steps = config.train.num_steps
  keys = state.run_keys(config.train.seed)
  schedule = optim.learning_rate(config.optim, num_steps)
  tx = optim.make_optimizer(config.optim, num_steps)
  ema_decay = config.optim.ema_decay
  train_state = state.create(model, feature_map, tx, keys, ema=ema_decay > 0)
  sizes = state.sizes(train_state)
  storage = Storage(
    workdir / run_folder.CHECKPOINTS, keep=config.checkpoint.keep
  )
  record = Record(
    data=make_batches(
      datasets["train"], config.train.batch_size, train=True
    ).state()
  )
  init_lines = []
  restored = storage.restore_latest(train_state)
  if restored:
    train_state, stored = restored
    record = Record(**stored)
  elif config.model.init_from:
    train_state, init_lines = pretrained.start_from(train_state, config)
  start = int(train_state.step)
  train_state = parallel.replicate(train_state)
  dropout_rng = parallel.replicate(keys.dropout_rng)

  # 4. Step functions.
  guessing = functools.partial(
    objectives.guessing,
    objective=config.train.objective,
    mask_token=model.vocab_size - 1,
  )
  train_step = parallel.DataParallelStep(
    guessing(
      functools.partial(
        steps.train_step,
        apply_fn=model.apply,
        tx=tx,
        accumulate=config.train.accumulate,
        label_smoothing=config.optim.label_smoothing,
        ema_decay=ema_decay,
      )
    ),
    engine=config.train.parallel,
    donate_state=True,
  )
  eval_step = parallel.DataParallelStep(
    guessing(functools.partial(steps.eval_step, apply_fn=model.apply)),
    engine=config.train.parallel,
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
    storage,
    data.Prefetch(
      make_batches(
        datasets["train"],
        config.train.batch_size,
        train=True,
        state=record.data,
      )
    ) as batches,
    MetricWriter(
      workdir,
      start_step=start,
      tensorboard=config.logging.tensorboard,
      first_row=min(config.logging.every, config.eval.every),
      wandb=wandb_run.start(config.logging.wandb, workdir, to_dict(config))
      if hosts.is_main()
      else None,
      enabled=hosts.is_main(),
    ) as writer,
    Profiler(
      workdir / run_folder.PROFILE, config.profile if hosts.is_main() else 0
    ) as profiler,
    Progress(
      num_steps,
      start,
      interval_seconds=config.logging.interval_seconds,
      bar=config.logging.progress_bar if hosts.is_main() else False,
    ) as progress,
  ):
    for line in (
      *describe.run(config, workdir, facts, sizes, start),
      *describe.variables(train_state),
      *init_lines,
    ):
      progress.line(line)
    window = Window(record.window)
    skipped = SkippedSteps(record, config.train.max_skipped_steps)
    clock = Clock(record, train_step, eval_step)
    with StopSignals() as signals:
      for step in range(start, num_steps):
        if out_of_patience(record, config.eval):
          progress.line(describe.out_of_patience(record, config.eval.patience))
          break
        if interval and step and step % interval == 0:
          train_state = redraw(train_state, keys.redraw_rng)
        batch = next(batches)
        if step == start:
          train_step.compile(train_state, batch, dropout_rng)
          if plan := train_step.memory_plan():
            progress.line(describe.memory(plan))
        train_state, sums = train_step(train_state, batch, dropout_rng)
        done = step + 1
        if profiled := profiler.step(done, sums):
          progress.line(profiled)
        window.add(sums)
        skipped.add(done, batch, sums)
        progress.step(done)

        last = done == num_steps
        stop = signals.stop_after(done)
        log_now = last or done % config.logging.every == 0
        evaluate_now = last or done % config.eval.every == 0
        save_now = last or stop or done % config.checkpoint.every == 0
        if log_now or evaluate_now or save_now:
          window.collect()
          skipped.collect()
        if skipped.too_many:
          raise explain_skipped(
            workdir,
            skipped,
            record,
            guessing(
              functools.partial(
                steps.gradient_norms,
                apply_fn=model.apply,
                label_smoothing=config.optim.label_smoothing,
              )
            ),
            train_state,
            dropout_rng,
          )
        if not (log_now or evaluate_now or save_now):
          continue
        clock.stop()
        if log_now:
          values = {f"train/{name}": x for name, x in window.means().items()}
          values["train/learning_rate"] = float(schedule(step - record.skipped))
          values["train/examples_per_second"] = clock.rate(window.weight)
          values["train/skipped_steps"] = record.skipped
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
          save_now = save_now or out_of_patience(record, config.eval)
          progress.line(describe.dev(record))
        if save_now:
          writer.sync()
          record.data, record.window = batches.state(), window.sums
          storage.save(
            train_state,
            dataclasses.asdict(record),
            best_step=record.best and record.best["step"],
          )
        if stop:
          progress.line(f"{signals.received}: stops; step {done} is saved")
          break
        clock.start()

    # 6. Test accuracy of the last and of the best-dev parameters.
    test_last = test_best = evaluate(train_state, datasets["test"])
    if record.best["step"] != record.dev["step"]:
      best_state, _ = storage.restore(record.best["step"], train_state)
      test_best = evaluate(parallel.replicate(best_state), datasets["test"])
    outcome = {
      **{f"test/{name}_best": x for name, x in test_best.items()},
      **{f"test/{name}_last": x for name, x in test_last.items()},
      **describe.result(config, datasets["test"], record),
      **sizes,
    }
    losses = {
      "test split, best-dev parameters": test_best["loss"],
      "test split, last parameters": test_last["loss"],
    }
    outcome["diverged"] = describe.divergence(record, losses)
    outcome["test/accuracy"] = test_best["accuracy"]
    writer.write(record.dev["step"], outcome)


def find_result(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
  """The result of a finished run, whose report is written again if it can be.

  Raises:
    ValueError: the workdir holds another config, or a damaged result.
  """
  run_folder.check_config(workdir, to_dict(config))
  result = finished_result(workdir, config.train.num_steps)
  if result:
    try:
      report.write_report(workdir)
    except OSError as error:  # such as a folder that is for reading alone
      logging.warning("The report is not written again: %s", error)
  return result


def load_data(
  config: ConfigDict, splits: Sequence[str] = data.SPLITS
) -> dict[str, data.Dataset]:
  """Splits of the task, from the cache or built into it."""
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
    for split in splits
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


def explain_skipped(
  workdir: Path,
  skipped: SkippedSteps,
  record: Record,
  gradient_norms: Callable[..., Any],
  train_state: state.TrainState,
  dropout_rng: Array,
) -> Exception:
  """Reports the steps that were skipped; returns the error to raise."""
  step, batch = skipped.too_many
  norms = parallel.DataParallelStep(gradient_norms)
  # Those parameters are what the step saw, unless one of the few steps that
  # were under way since has changed them: the steps before it did not.
  before = train_state._replace(step=parallel.replicate(np.int32(step - 1)))
  return nonfinite.write_report(
    workdir,
    step,
    batch,
    record,
    lambda batch: norms(before, batch, dropout_rng),
  )
