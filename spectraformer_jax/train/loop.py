"""Runs an experiment: the parts of a run, from config to report, in order."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from spectraformer_jax import data
from spectraformer_jax.nn import from_config
from spectraformer_jax.train import pretrained
from spectraformer_jax.train.config import Config, to_dict, validate
from spectraformer_jax.train.devices import hosts, parallel
from spectraformer_jax.train.inputs import load_data, make_batches
from spectraformer_jax.train.programs import (
  Programs,
  evaluate_split,
  make_programs,
)
from spectraformer_jax.train.run import describe, report, run_folder, wandb_run
from spectraformer_jax.train.run.lock import workdir_lock
from spectraformer_jax.train.run.meters import Record
from spectraformer_jax.train.run.profiler import Profiler
from spectraformer_jax.train.run.progress import Progress
from spectraformer_jax.train.run.storage import Storage
from spectraformer_jax.train.run.writers import (
  MetricWriter,
  finished_result,
  read_rows,
  result_row,
)
from spectraformer_jax.train.run_steps import Experiment, Outputs, run_steps
from spectraformer_jax.train.step import objectives, optim, state
from spectraformer_jax.train.teacher import load_teacher


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
    split: describe.split_facts(dataset) for split, dataset in datasets.items()
  }
  batches = make_batches(config, datasets["train"], train=True)
  model = from_config.make_model(config, feature_map, facts["train"])
  # Batch normalisation, if any, takes its moments over all devices.
  if hasattr(model, "batch_axis"):
    model = model.clone(batch_axis=parallel.AXIS)
  teacher = load_teacher(config, model, facts["train"])
  experiment = Experiment(
    config, workdir, feature_map, model, datasets, facts, teacher
  )

  with hosts.entered_by_main(workdir_lock(workdir)):
    # Looked up again: another run may have finished before this one got the
    # lock.
    if finished := hosts.from_main(find_result, workdir, config):
      logging.info("%s holds a finished run by now.", workdir)
      return finished
    hosts.from_main(run_folder.check_data, workdir, facts)
    teacher_facts = teacher and teacher.facts
    hosts.from_main(run_folder.check_teacher, workdir, teacher_facts)
    hosts.from_main(
      run_folder.write_config,
      workdir,
      to_dict(config),
      facts,
      command,
      teacher_facts,
    )
    train(experiment, batches)
    hosts.from_main(report.write_report, workdir)
    return hosts.from_main(lambda: result_row(read_rows(workdir)))


def train(experiment: Experiment, batches: data.Batches) -> None:
  """Runs parts 3 to 6 of a run: from its state to its result.

  Args:
    experiment: its workdir is locked for this run.
    batches: of the train split, from its start.
  """
  config, workdir, feature_map, model, datasets, facts, teacher = experiment

  # 3. The state: initial, or that of the last checkpoint.
  keys = state.run_keys(config.train.seed)
  tx = optim.make_optimizer(config.optim, config.train.num_steps)
  has_ema = config.optim.ema_decay > 0
  train_state = state.create(model, feature_map, tx, keys, ema=has_ema)
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

  # 4. The programs for the devices.
  programs = make_programs(config, model, feature_map, tx, teacher)

  with (
    storage,
    data.Prefetch(batches) as prefetched,
    open_outputs(config, workdir, storage, start) as outputs,
  ):
    for line in (
      *describe.run_lines(
        config, workdir, facts, state.sizes(train_state), start
      ),
      *describe.variable_lines(train_state),
      *init_lines,
      *describe.teacher_lines(teacher and teacher.facts),
    ):
      outputs.progress.line(line)

    # 5. Training.
    train_state = run_steps(
      experiment, programs, keys, train_state, record, prefetched, outputs
    )

    # 6. Test accuracy of the last and of the best-dev parameters.
    write_result(experiment, programs, train_state, record, outputs)


@contextlib.contextmanager
def open_outputs(
  config: Config, workdir: Path, storage: Storage, start: int
) -> Iterator[Outputs]:
  """Opens the outputs of a run that starts after step `start`."""
  is_main = hosts.is_main()
  wandb = None
  if is_main:
    wandb = wandb_run.start(config.logging.wandb, workdir, to_dict(config))
  with (
    MetricWriter(
      workdir,
      start_step=start,
      tensorboard=config.logging.tensorboard,
      first_row=min(config.logging.every, config.eval.every),
      wandb=wandb,
      enabled=is_main,
    ) as writer,
    Profiler(
      workdir / run_folder.PROFILE, config.profile if is_main else 0
    ) as profiler,
    Progress(
      config.train.num_steps,
      start,
      interval_seconds=config.logging.interval_seconds,
      bar=config.logging.progress_bar if is_main else False,
    ) as progress,
  ):
    yield Outputs(storage, writer, profiler, progress)


def write_result(
  experiment: Experiment,
  programs: Programs,
  train_state: state.TrainState,
  record: Record,
  outputs: Outputs,
) -> None:
  """Evaluates on the test split, and writes the last row of metrics.jsonl.

  Args:
    experiment: that has been trained.
    programs: of the run.
    train_state: the last one, replicated.
    record: that belongs to it.
    outputs: of the run; they hold the checkpoint of the best-dev parameters.
  """
  config, test = experiment.config, experiment.datasets["test"]
  evaluate = functools.partial(evaluate_split, config, programs.eval_step)
  dev, best = record.dev, record.best
  assert dev and best  # a run evaluates before it ends
  test_last = test_best = evaluate(train_state, test)
  if best["step"] != dev["step"]:
    best_state, _ = outputs.storage.restore(best["step"], train_state)
    test_best = evaluate(parallel.replicate(best_state), test)
  test_losses = {
    "test split, best-dev parameters": test_best["loss"],
    "test split, last parameters": test_last["loss"],
  }
  result = {
    **{f"test/{name}_best": x for name, x in test_best.items()},
    **{f"test/{name}_last": x for name, x in test_last.items()},
    **describe.result_values(config, test, record, dev, best),
    **state.sizes(train_state),
    "diverged": describe.divergence(record, dev, test_losses),
    "test/accuracy": test_best["accuracy"],
  }
  outputs.writer.write(dev["step"], result)


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
