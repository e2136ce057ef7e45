"""What the experiments share."""

import functools

from ml_collections import ConfigDict

from spectraformer_jax.train import recipes
from spectraformer_jax.train.config import default_config


def base(task: str) -> ConfigDict:
  """The paper's model and the official training settings, for `task`."""
  config = default_config()
  config.task.name = task
  return config


def experiment(*variants: str):
  """Decorates a `get_config(variant)`, whose variants have these names.

  What follows the colon in --config=file.py:... is then one of them, or
  recipe=NAME for an optimiser of `spectraformer_jax.train.recipes`, or both
  with a comma between. The recipe comes last, so it is whole; flags for single
  keys come after it.
  """

  def decorate(get_config):
    @functools.wraps(get_config)
    def with_recipe(text: str | None = None) -> ConfigDict:
      parts = text.split(",") if text else []
      names = [part for part in parts if part.startswith("recipe=")]
      rest = ",".join(part for part in parts if part not in names) or None
      check_variant(rest, variants)
      if len(names) > 1:
        raise ValueError(f"One recipe at a time, got {text!r}.")
      config = get_config(rest)
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
      f"Unknown variant {variant!r} of this config; {options}; recipe=NAME "
      "sets an optimiser."
    )


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
