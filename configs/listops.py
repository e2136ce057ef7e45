"""listops."""

from configs import common


def get_config(variant=None):
  common.check_variant(variant, ("quick",))
  config = common.base("listops")
  config.task.pad_to_multiple = 128
  if variant == "quick":
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.clip = "global_norm"
    config.train.num_steps = 1000
    config.train.batch_size = 16
    config.eval.every = 250
  return config
