"""The steps of a run as programs for all its devices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from spectraformer_jax import data, nn
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.from_config import Model
from spectraformer_jax.train.config import Config
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.inputs import make_batches
from spectraformer_jax.train.run.meters import Window
from spectraformer_jax.train.step import objectives, state, steps
from spectraformer_jax.train.teacher import Teacher


class Programs(NamedTuple):
  """What a run computes on its devices.

  Attributes:
    train_step: `steps.train_step`; the state that it is given is used up.
    eval_step: `steps.eval_step`.
    redraw: `(state, redraw_rng) -> state` with new projections; None if the run
      never draws them again.
  """

  train_step: parallel.DataParallelStep
  eval_step: parallel.DataParallelStep
  redraw: Callable[..., state.TrainState] | None


def make_programs(
  config: Config,
  model: Model,
  feature_map: FeatureMap | None,
  tx: optax.GradientTransformation,
  teacher: Teacher | None = None,
) -> Programs:
  """Makes the programs of a run; compiles nothing yet.

  Args:
    config: of the run.
    model: of `nn.from_config.make_model`.
    feature_map: that of the model; None for a baseline attention.
    tx: the optimiser.
    teacher: whose outputs are learnt; None for labels.
  """
  redraw, interval = None, config.feature_map.redraw_interval
  if feature_map and interval:
    redraw = parallel.on_one_device(
      functools.partial(
        steps.redraw_step,
        redraw_fn=functools.partial(nn.redraw, feature_map),
        interval=interval,
      )
    )
  train_step = on_devices(
    config,
    model,
    steps.train_step,
    donate_state=True,
    tx=tx,
    accumulate=config.train.accumulate,
    label_smoothing=config.optim.label_smoothing,
    ema_decay=config.optim.ema_decay,
    teacher_fn=teacher and teacher.model.apply,
  )
  return Programs(
    train_step, on_devices(config, model, steps.eval_step), redraw
  )


def on_devices(
  config: Config,
  model: Model,
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
    objectives.for_objective(
      functools.partial(step, apply_fn=model.apply, **options),
      objective=config.train.objective,
      mask_token=model.vocab_size - 1,  # the last id; for "masked"
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
