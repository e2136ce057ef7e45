"""The training steps of a run, and what happens between them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from spectraformer_jax import data
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.from_config import Model
from spectraformer_jax.train.config import Config
from spectraformer_jax.train.devices import hosts, parallel
from spectraformer_jax.train.programs import (
  Programs,
  evaluate_split,
  on_devices,
)
from spectraformer_jax.train.run import describe, nonfinite
from spectraformer_jax.train.run.meters import Clock, Evaluation, Record, Window
from spectraformer_jax.train.run.nonfinite import SkippedSteps
from spectraformer_jax.train.run.profiler import Profiler
from spectraformer_jax.train.run.progress import Progress
from spectraformer_jax.train.run.selection import is_better, out_of_patience
from spectraformer_jax.train.run.signals import StopSignals
from spectraformer_jax.train.run.storage import Storage
from spectraformer_jax.train.run.writers import MetricWriter
from spectraformer_jax.train.step import optim, state, steps
from spectraformer_jax.train.teacher import Teacher


class Experiment(NamedTuple):
  """What a run is made of, before it has a state.

  Attributes:
    config: of the run.
    workdir: its folder.
    feature_map: that of the model; None for a baseline attention.
    model: of `nn.from_config.make_model`.
    datasets: by name of the split.
    facts: of `describe.split_facts`, by name of the split.
    teacher: whose outputs are learnt; None for labels.
  """

  config: Config
  workdir: Path
  feature_map: FeatureMap | None
  model: Model
  datasets: Mapping[str, data.Dataset]
  facts: Mapping[str, Mapping[str, Any]]
  teacher: Teacher | None = None


class Outputs(NamedTuple):
  """Where a run writes while it trains."""

  storage: Storage
  writer: MetricWriter
  profiler: Profiler
  progress: Progress

  def metrics(self, step: int, values: Mapping[str, float]) -> None:
    """Writes and shows metrics after a step."""
    self.writer.write(step, values)
    self.progress.values(step, values)


def run_steps(
  experiment: Experiment,
  programs: Programs,
  keys: state.RunKeys,
  train_state: state.TrainState,
  record: Record,
  batches: data.Prefetch,
  outputs: Outputs,
) -> state.TrainState:
  """Trains to the last step of the run; evaluates and saves on the way.

  Args:
    experiment: what to train.
    programs: of the run.
    keys: of the run.
    train_state: to start from, replicated.
    record: that belongs to the state; it is updated.
    batches: of the train split; the first one is that of the next step.
    outputs: of the run.

  Returns:
    The last state, replicated.

  Raises:
    KeyboardInterrupt: a signal has ended the run; its state is saved.
    NonFiniteError: too many steps in a row were skipped.
  """
  config, num_steps = experiment.config, experiment.config.train.num_steps
  storage, writer, profiler, progress = outputs
  start = int(train_state.step)
  constants = (parallel.replicate(keys.dropout_rng),)
  if experiment.teacher:
    constants += (parallel.replicate(experiment.teacher.variables),)
  schedule = optim.learning_rate(config.optim, num_steps)
  redraw_interval = config.feature_map.redraw_interval
  window = Window(record.window)
  skipped = SkippedSteps(record, config.train.max_skipped_steps)
  clock = Clock(record, programs.train_step, programs.eval_step)
  with StopSignals() as signals:
    for step in range(start, num_steps):
      if out_of_patience(record, config.eval):
        progress.line(describe.early_stop_line(record, config.eval.patience))
        break
      if programs.redraw and step and step % redraw_interval == 0:
        train_state = programs.redraw(train_state, keys.redraw_rng)
      batch = next(batches)
      if step == start:
        programs.train_step.compile(train_state, batch, *constants)
        if plan := programs.train_step.memory_plan():
          progress.line(describe.memory_line(plan))
      train_state, sums = programs.train_step(train_state, batch, *constants)
      done = step + 1
      if message := profiler.step(done, sums):
        progress.line(message)
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
          experiment, *skipped.too_many, record, train_state, *constants
        )
      if not any(now):
        continue
      clock.stop()
      if now.log:
        values = {f"train/{name}": x for name, x in window.means().items()}
        # A skipped step does not advance the optimiser's schedule.
        rate = np.asarray(schedule(step - record.skipped))
        values["train/learning_rate"] = float(rate)
        values["train/examples_per_second"] = clock.rate(window.weight)
        values["train/skipped_steps"] = record.skipped
        window.reset()
        outputs.metrics(done, values)
      save = now.save
      if now.evaluate:
        means = evaluate_split(
          config, programs.eval_step, train_state, experiment.datasets["dev"]
        )
        outputs.metrics(done, {f"dev/{name}": x for name, x in means.items()})
        record.dev = Evaluation(
          step=done, loss=means["loss"], accuracy=means["accuracy"]
        )
        if is_better(record.dev, record.best):
          record.best, save = record.dev, True
        # The run then ends here: the last state must be saved.
        save = save or out_of_patience(record, config.eval)
        progress.line(describe.dev_line(record.dev, record.best))
      if save:
        writer.sync()
        record.data, record.window = batches.state(), window.sums
        storage.save(
          train_state,
          dataclasses.asdict(record),
          best_step=record.best and record.best["step"],
        )
      if stop:
        progress.line(f"{signals.received}: stops; step {done} is saved")
        break  # leaving `StopSignals` raises KeyboardInterrupt
      clock.start()
  return train_state


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


def fail_not_finite(
  experiment: Experiment,
  step: int,
  batch: Mapping[str, np.ndarray],
  record: Record,
  train_state: state.TrainState,
  *constants: Any,
) -> NoReturn:
  """Writes a report about the skipped steps and raises `NonFiniteError`.

  Args:
    experiment: of the run.
    step: the last of the skipped steps.
    batch: of that step.
    record: of the run.
    train_state: after that step.
    *constants: arguments of the step beside state and batch.
  """
  config = experiment.config
  gradient_norms = on_devices(
    config,
    experiment.model,
    steps.gradient_norms,
    label_smoothing=config.optim.label_smoothing,
    teacher_fn=experiment.teacher and experiment.teacher.model.apply,
  )
  # A few steps were dispatched after the skipped one. If they were skipped too,
  # the parameters are still those that it started from.
  before = train_state._replace(step=parallel.replicate(np.int32(step - 1)))
  norms, loss = jax.device_get(gradient_norms(before, batch, *constants))
  folder = experiment.workdir / f"nonfinite-step-{step}"
  if hosts.is_main():
    nonfinite.write_report(folder, step, batch, record, norms, loss)
  raise nonfinite.NonFiniteError(
    f"Loss or gradient was not finite in {record.skipped_in_a_row} steps in a "
    f"row, the last of them step {step}; see {folder}/report.md; "
    f"{nonfinite.ADVICE}."
  )
