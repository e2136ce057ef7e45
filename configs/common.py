"""What the experiments share."""

from ml_collections import ConfigDict

from spectraformer_jax.train.config import default_config


def base(task: str) -> ConfigDict:
  """The paper's model and the official training settings, for `task`."""
  config = default_config()
  config.task.name = task
  return config


def check_variant(variant: str | None, known: tuple[str, ...] = ()) -> None:
  """Refuses what follows the colon in --config=file.py:variant if unknown."""
  if variant not in (None, *known):
    options = f"known: {', '.join(known)}" if known else "it has none"
    raise ValueError(f"Unknown variant {variant!r} of this config; {options}.")


def set_lra_optimizer(config: ConfigDict) -> None:
  """Adam as in the code of Long Range Arena; without clipping."""
  config.optim.b2 = 0.98
  config.optim.eps = 1e-9
  config.optim.clip = "none"


def set_lra_schedule(config: ConfigDict, warmup_steps: int) -> None:
  """Long Range Arena's learning rate for texts: 0.05 over the root of steps."""
  config.optim.schedule = "rsqrt"
  config.optim.warmup_steps = warmup_steps
  config.optim.lr = 0.05 / warmup_steps**0.5
  config.optim.weight_decay = 0.1


def set_model(config: ConfigDict, **sizes: int | float | str) -> None:
  """Changes several keys of the model."""
  for name, value in sizes.items():
    config.model[name] = value


def set_quick(config: ConfigDict) -> None:
  """A short run that shows whether anything is learnt."""
  config.optim.lr = 1e-3
  config.optim.schedule = "cosine"
  config.optim.warmup_steps = 30
  config.optim.clip = "global_norm"
  config.train.num_steps = 300
  config.train.batch_size = config.eval.batch_size = 16
  config.eval.every = 150
  config.checkpoint.every = 50
  config.logging.every = 10
