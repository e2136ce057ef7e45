"""Functions that the experiments share."""

import functools
from collections.abc import Callable
from typing import Protocol

from spectraformer_jax.train import recipes
from spectraformer_jax.train.config import Config, default_config, pair_name

STAGES = ("pretrain", "finetune")


class Experiment(Protocol):
  """The type of a decorated `get_config`."""

  def __call__(self, text: str | None = None) -> Config:
    """Makes a config; `text` follows the colon in --config=file.py:text."""
    ...


def base(task: str) -> Config:
  """Returns the paper's model and training settings for `task`."""
  config = default_config()
  config.task.name = task
  return config


def experiment(
  *variants: str,
) -> Callable[[Callable[[str | None], Config]], Experiment]:
  """Decorates a `get_config(variant)` that knows the variants of these names.

  The text after the colon in --config=file.py:text may then be a variant; a
  stage of self-pretraining (pretrain, finetune; see `set_stage`); a variant and
  a stage (VARIANT-pretrain); recipe=NAME for an optimiser of
  `spectraformer_jax.train.recipes`; or one of the first three, a comma and
  recipe=NAME. The recipe is applied after the variant and the stage, so all its
  values hold; flags for single keys are applied after the recipe.
  """

  def decorate(get_config: Callable[[str | None], Config]) -> Experiment:
    @functools.wraps(get_config)
    def with_recipe(text: str | None = None) -> Config:
      parts = text.split(",") if text else []
      names = [part for part in parts if part.startswith("recipe=")]
      rest = ",".join(part for part in parts if part not in names) or None
      variant, stage = split_stage(rest)
      check_variant(variant, variants)
      if len(names) > 1:
        raise ValueError(f"One recipe at a time, got {text!r}.")
      config = get_config(variant)
      if stage:
        set_stage(config, variant, stage)
      for name in names:
        recipes.use(config, name.removeprefix("recipe="))
      return config

    return with_recipe

  return decorate


def check_variant(variant: str | None, known: tuple[str, ...] = ()) -> None:
  """Raises ValueError for an unknown variant in --config=file.py:variant."""
  if variant not in (None, *known):
    options = f"known: {', '.join(known)}" if known else "it has none"
    raise ValueError(
      f"Unknown variant {variant!r} of this config; {options}; pretrain and "
      "finetune are stages of each, recipe=NAME sets an optimiser."
    )


def split_stage(text: str | None) -> tuple[str | None, str | None]:
  """Splits "VARIANT-STAGE"; either part may be missing.

  Example:
    >>> split_stage("deep-pretrain"), split_stage("finetune")
    (('deep', 'pretrain'), (None, 'finetune'))
  """
  variant, _, stage = (text or "").rpartition("-")
  if stage in STAGES:
    return variant or None, stage
  return text, None


def set_stage(config: Config, variant: str | None, stage: str) -> None:
  """Makes `config` one of the two runs of self-pretraining (arXiv 2310.02980).

  "pretrain" learns to predict hidden tokens of the task's own inputs.
  "finetune" learns the labels; it starts from the weights in the default
  workdir of the "pretrain" run. --config.model.init_from names another workdir.
  """
  if stage == "pretrain":
    config.train.objective = "masked"
    return
  name = config.task.name + (f"-{variant}" if variant else "")
  pair, seed = pair_name(config), config.train.seed
  config.model.init_from = f"runs/{name}-pretrain-{pair}-seed{seed}"


def set_quick(config: Config) -> None:
  """Makes `config` a run of minutes, to see whether anything is learnt."""
  config.train.num_steps = 300
  recipes.use(config, "modern")
  config.optim.warmup_steps = 30
  config.optim.weight_decay = 0.0
  config.train.batch_size = config.eval.batch_size = 16
  config.eval.every = 150
  config.checkpoint.every = 50
  config.logging.every = 10
