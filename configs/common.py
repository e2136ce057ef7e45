"""What the experiments share."""

import functools

from ml_collections import ConfigDict

from spectraformer_jax.train import recipes
from spectraformer_jax.train.config import default_config, pair_name

STAGES = ("pretrain", "finetune")


def base(task: str) -> ConfigDict:
  """The paper's model and the official training settings, for `task`."""
  config = default_config()
  config.task.name = task
  return config


def experiment(*variants: str):
  """Decorates a `get_config(variant)`, whose variants have these names.

  What follows the colon in --config=file.py:... is then one of them, a stage of
  self-pretraining of it (pretrain, finetune; VARIANT-pretrain,
  VARIANT-finetune; see `set_stage`), or recipe=NAME for an optimiser of
  `spectraformer_jax.train.recipes`, or two of these with a comma between. The
  recipe comes last, so it is whole; flags for single keys come after it.
  """

  def decorate(get_config):
    @functools.wraps(get_config)
    def with_recipe(text: str | None = None) -> ConfigDict:
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
  """Refuses what follows the colon in --config=file.py:variant if unknown."""
  if variant not in (None, *known):
    options = f"known: {', '.join(known)}" if known else "it has none"
    raise ValueError(
      f"Unknown variant {variant!r} of this config; {options}; pretrain and "
      "finetune are stages of each, recipe=NAME sets an optimiser."
    )


def split_stage(text: str | None) -> tuple[str | None, str | None]:
  """Parts "VARIANT-STAGE" in two; either may be missing.

  Example:
    >>> split_stage("deep-pretrain"), split_stage("finetune")
    (('deep', 'pretrain'), (None, 'finetune'))
  """
  variant, _, stage = (text or "").rpartition("-")
  if stage in STAGES:
    return variant or None, stage
  return text, None


def set_stage(config: ConfigDict, variant: str | None, stage: str) -> None:
  """Self-pretraining (Amos et al., arXiv 2310.02980) in two runs.

  "pretrain" learns hidden tokens of the task's own inputs, "finetune" the
  labels, from the weights of the other run where `train.py` puts it; elsewhere
  --config.model.init_from finds it.
  """
  if stage == "pretrain":
    config.train.objective = "masked"
    return
  name = config.task.name + (f"-{variant}" if variant else "")
  pair, seed = pair_name(config), config.train.seed
  config.model.init_from = f"runs/{name}-pretrain-{pair}-seed{seed}"


def set_model(config: ConfigDict, **sizes: int | float | str) -> None:
  """Changes several keys of the model."""
  for name, value in sizes.items():
    config.model[name] = value


def set_quick(config: ConfigDict) -> None:
  """A short run that shows whether anything is learnt."""
  config.train.num_steps = 300
  recipes.use(config, "modern")
  config.optim.warmup_steps = 30
  config.optim.weight_decay = 0.0
  config.train.batch_size = config.eval.batch_size = 16
  config.eval.every = 150
  config.checkpoint.every = 50
  config.logging.every = 10
