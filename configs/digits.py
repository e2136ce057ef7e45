"""digits."""

from configs import common


def get_config(variant=None):
  common.check_variant(variant)
  config = common.base("digits")
  config.optim.lr = 2e-3
  config.optim.schedule = "cosine"
  config.optim.warmup_steps = 50
  config.optim.clip = "global_norm"
  config.train.num_steps = 800
  config.train.batch_size = 64
  config.eval.every = 50
  config.eval.batch_size = 64
  config.checkpoint.every = 100
  config.logging.every = 10
  return config
