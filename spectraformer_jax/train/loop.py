"""Runs an experiment: the parts of a run, from config to report, in order."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from absl import logging

from spectraformer_jax import data, nn
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn import from_config
from spectraformer_jax.train import pretrained
from spectraformer_jax.train.config import Config, to_dict, validate
from spectraformer_jax.train.devices import hosts, parallel
from spectraformer_jax.train.inputs import load_data, make_batches
from spectraformer_jax.train.run import (
  describe,
  nonfinite,
  report,
  run_folder,
  wandb_run,
)
from spectraformer_jax.train.run.lock import workdir_lock
from spectraformer_jax.train.run.meters import (
  Clock,
  Evaluation,
  Record,
  Window,
)
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
  config: Config, workdir: Path | str, *, command: str | None = None
) -> dict[str, Any]:
  """Trains a model, or continues to train it, and evaluates it.

  A second call with the same config and workdir resumes from the last
  checkpoint; on the same devices the result is equal, bit for bit. If the run
  has finished, the call only writes its report and returns its result again.
  SIGTERM and SIGINT end a run after the current step, with its state saved.

  Args:
    config: all sections of `config.default_config`.
    workdir: made if it does not exist. docs/training.md lists its contents.
    command: the command line of this run, for its report.

  Returns:
    The last row of metrics.jsonl: "test/accuracy" and more; "diverged" says why
    the result is no good, and is None if the result is good.

  Raises:
    ValueError: before anything is compiled: a wrong key or value of the config,
      an unknown name, a batch size that the devices cannot share, or a workdir
      that holds another config or is in use.
    KeyboardInterrupt: a signal has ended the run.
    NonFiniteError: `train.max_skipped_steps` steps in a row had a loss or
      gradient that is not finite.
    OSError: files could not be written, as when the disk is full.
  """
  workdir = Path(workdir)

  # 1. Checks that need no data.
  validate(config)
  hosts.from_main(run_folder.check_folder, workdir)
  wandb_run.load(config.logging.wandb)
  feature_map = from_config.make_feature_map(config)
  optim.check_feature_map_lr(config.optim, feature_map)
  parallel.check_batch_size(
    "config.train.batch_size", config.train.batch_size, config.train.accumulate
  )
  parallel.check_batch_size("config.eval.batch_size", config.eval.batch_size)
  if finished := hosts.from_main(find_result, workdir, config):
    logging.info("%s holds a finished run.", workdir)
    return finished
  if source := config.model.init_from:
    hosts.from_main(pretrained.check_source, workdir, source)

  # 2. Data and model; they make their own checks, also before compilation.
  datasets = load_data(config)
  objectives.check_lengths(config.train.objective, datasets)
  facts = {
    split: describe.split(dataset) for split, dataset in datasets.items()
  }
  batches = make_batches(config, datasets["train"], train=True)
  model = from_config.make_model(config, feature_map, facts["train"])
  # Batch normalisation, if any, takes its moments over all devices.
  if hasattr(model, "batch_axis"):
    model = model.clone(batch_axis=parallel.AXIS)

  with hosts.entered_by_main(workdir_lock(workdir)):
    # Looked up again: another run may have finished before this one got the
    # lock.
    if finished := hosts.from_main(find_result, workdir, config):
      logging.info("%s holds a finished run by now.", workdir)
      return finished
    hosts.from_main(run_folder.check_data, workdir, facts)
    hosts.from_main(
      run_folder.write_config, workdir, to_dict(config), facts, command
    )
    train(config, workdir, feature_map, model, datasets, facts, batches)
    hosts.from_main(report.write_report, workdir)
    return hosts.from_main(lambda: result_row(read_rows(workdir)))


def train(
  config: Config,
  workdir: Path,
  feature_map: FeatureMap | None,
  model: from_config.Model,
  datasets: Mapping[str, data.Dataset],
  facts: Mapping[str, Mapping[str, Any]],
  batches: data.Batches,
) -> None:
  """Runs parts 3 to 6 of a run: from its state to its result.

  Args:
    config: of the run.
    workdir: its folder, locked for this run.
    feature_map: that of the model; None for a baseline attention.
    model: of `from_config.make_model`.
    datasets: by name of the split.
    facts: of `describe.split`, by name of the split.
    batches: of the train split, from its start.
  """
  # 3. The state: initial, or that of the last checkpoint.
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
  record, init_lines = Record(), []
  if restored := storage.restore_latest(train_state):
    train_state, stored = restored
    record = Record(**stored)
    batches = make_batches(
      config, datasets["train"], train=True, state=record.data
    )
  elif config.model.init_from:
    train_state, init_lines = pretrained.start_from(train_state, config)
  start = int(train_state.step)
  train_state = parallel.replicate(train_state)
  dropout_rng = parallel.replicate(keys.dropout_rng)

  # 4. Step functions.
  train_step = on_devices(
    config,
    model,
    steps.train_step,
    donate_state=True,
    tx=tx,
    accumulate=config.train.accumulate,
    label_smoothing=config.optim.label_smoothing,
    ema_decay=ema_decay,
  )
  eval_step = on_devices(config, model, steps.eval_step)
  evaluate = functools.partial(evaluate_split, config, eval_step)
  redraw, interval = None, config.feature_map.redraw_interval
  if feature_map and interval:
    redraw = parallel.on_one_device(
      functools.partial(
        steps.redraw_step,
        redraw_fn=functools.partial(nn.redraw, feature_map),
        interval=interval,
      )
    )

  # 5. Training.
  is_main = hosts.is_main()
  with (
    storage,
    data.Prefetch(batches) as prefetched,
    MetricWriter(
      workdir,
      start_step=start,
      tensorboard=config.logging.tensorboard,
      first_row=min(config.logging.every, config.eval.every),
      wandb=wandb_run.start(config.logging.wandb, workdir, to_dict(config))
      if is_main
      else None,
      enabled=is_main,
    ) as writer,
    Profiler(
      workdir / run_folder.PROFILE, config.profile if is_main else 0
    ) as profiler,
    Progress(
      num_steps,
      start,
      interval_seconds=config.logging.interval_seconds,
      bar=config.logging.progress_bar if is_main else False,
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
        if redraw and step and step % interval == 0:
          train_state = redraw(train_state, keys.redraw_rng)
        batch = next(prefetched)
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

        stop = signals.stop_after(done)
        now = due(config, done, stop=stop)
        if any(now):
          window.collect()
          skipped.collect()
        if skipped.too_many:
          fail_not_finite(
            config, workdir, model, skipped, record, train_state, dropout_rng
          )
        if not any(now):
          continue
        clock.stop()
        if now.log:
          values = {f"train/{name}": x for name, x in window.means().items()}
          rate = np.asarray(schedule(step - record.skipped))
          values["train/learning_rate"] = float(rate)
          values["train/examples_per_second"] = clock.rate(window.weight)
          values["train/skipped_steps"] = record.skipped
          window.reset()
          writer.write(done, values)
          progress.values(done, values)
        save = now.save
        if now.evaluate:
          means = evaluate(train_state, datasets["dev"])
          values = {f"dev/{name}": x for name, x in means.items()}
          writer.write(done, values)
          progress.values(done, values)
          record.dev = Evaluation(
            step=done, loss=means["loss"], accuracy=means["accuracy"]
          )
          if is_better(record.dev, record.best):
            record.best, save = record.dev, True
          save = save or out_of_patience(record, config.eval)
          progress.line(describe.dev(record.dev, record.best))
        if save:
          writer.sync()
          record.data, record.window = prefetched.state(), window.sums
          storage.save(
            train_state,
            dataclasses.asdict(record),
            best_step=record.best and record.best["step"],
          )
        if stop:
          progress.line(f"{signals.received}: stops; step {done} is saved")
          break  # leaving `StopSignals` raises KeyboardInterrupt
        clock.start()

    # 6. Test accuracy of the last and of the best-dev parameters.
    dev, best = record.dev, record.best
    assert dev and best  # a run evaluates before it ends
    test_last = test_best = evaluate(train_state, datasets["test"])
    if best["step"] != dev["step"]:
      best_state, _ = storage.restore(best["step"], train_state)
      test_best = evaluate(parallel.replicate(best_state), datasets["test"])
    test_losses = {
      "test split, best-dev parameters": test_best["loss"],
      "test split, last parameters": test_last["loss"],
    }
    outcome = {
      **{f"test/{name}_best": x for name, x in test_best.items()},
      **{f"test/{name}_last": x for name, x in test_last.items()},
      **describe.result(config, datasets["test"], record, dev, best),
      **sizes,
      "diverged": describe.divergence(record, dev, test_losses),
      "test/accuracy": test_best["accuracy"],
    }
    writer.write(dev["step"], outcome)


class Due(NamedTuple):
  """What is to be done after a training step.

  Attributes:
    log: write a row of training metrics.
    evaluate: evaluate on the dev split.
    save: write a checkpoint.
  """

  log: bool
  evaluate: bool
  save: bool


def due(config: Config, step: int, *, stop: bool = False) -> Due:
  """Returns what is to be done after a training step.

  Args:
    config: of the run.
    step: number of the step, from 1 on.
    stop: whether the run stops after it.
  """
  last = step == config.train.num_steps
  return Due(
    log=last or step % config.logging.every == 0,
    evaluate=last or step % config.eval.every == 0,
    save=last or stop or step % config.checkpoint.every == 0,
  )


def find_result(workdir: Path, config: Config) -> dict[str, Any] | None:
  """Returns the result of a finished run, and writes its report again.

  Returns None, and writes nothing, if the run has not finished.

  Raises:
    ValueError: the workdir holds another config, or a damaged result.
  """
  run_folder.check_config(workdir, to_dict(config))
  result = finished_result(workdir, config.train.num_steps)
  if result:
    try:
      report.write_report(workdir)
    except OSError as error:  # such as a read-only folder
      logging.warning("The report is not written again: %s", error)
  return result


def on_devices(
  config: Config,
  model: from_config.Model,
  step: Callable[..., Any],
  *,
  donate_state: bool = False,
  **options: Any,
) -> parallel.DataParallelStep:
  """Makes a step of `steps` run on all devices, for the config's objective.

  Args:
    config: of the run.
    model: whose `apply` the step calls.
    step: `train_step`, `eval_step` or `gradient_norms`.
    donate_state: see `DataParallelStep`.
    **options: of the step.
  """
  return parallel.DataParallelStep(
    objectives.guessing(
      functools.partial(step, apply_fn=model.apply, **options),
      objective=config.train.objective,
      mask_token=model.vocab_size - 1,  # only "masked" uses it
    ),
    engine=config.train.parallel,
    donate_state=donate_state,
  )


def evaluate_split(
  config: Config,
  eval_step: Callable[..., steps.Sums],
  train_state: state.TrainState,
  dataset: data.Dataset,
) -> dict[str, float]:
  """Returns mean loss and accuracy over every example of a split, each once."""
  window = Window()
  with data.Prefetch(make_batches(config, dataset, train=False)) as batches:
    for batch in batches:
      window.add(eval_step(train_state, batch))
  window.collect()
  return window.means()


def fail_not_finite(
  config: Config,
  workdir: Path,
  model: from_config.Model,
  skipped: SkippedSteps,
  record: Record,
  train_state: state.TrainState,
  dropout_rng: Array,
) -> NoReturn:
  """Writes a report about the skipped steps and raises `NonFiniteError`."""
  assert skipped.too_many
  step, batch = skipped.too_many
  gradient_norms = on_devices(
    config,
    model,
    steps.gradient_norms,
    label_smoothing=config.optim.label_smoothing,
  )
  # A few steps were dispatched after the skipped one. If they were skipped too,
  # the parameters are still those that it started from.
  before = train_state._replace(step=parallel.replicate(np.int32(step - 1)))
  norms, loss = jax.device_get(gradient_norms(before, batch, dropout_rng))
  folder = workdir / f"nonfinite-step-{step}"
  if hosts.is_main():
    nonfinite.write_report(folder, step, batch, record, norms, loss)
  raise nonfinite.NonFiniteError(
    f"Loss or gradient were not finite in {record.skipped_in_a_row} steps in "
    f"a row, the last of them step {step}; see {folder}/report.md. A lower "
    "config.optim.lr or another config.optim.clip may help."
  )
