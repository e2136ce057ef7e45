"""Handwritten digits as sequences of 64 pixels: the run to start with.

  python train.py
  python train.py --config.feature_map.component=posrf
  python train.py --config.model.attention=softmax

Data: the 1,797 images of scikit-learn's `load_digits`; with data seed 0, 1,465
train, 181 dev and 151 test images. Not a task of the paper: it stands in for
the image task of Long Range Arena, needs no download and is learnt in minutes.
The README's table has the test accuracy of three seeds.
"""

from configs import common
from spectraformer_jax.train import recipes
from spectraformer_jax.train.config import Config


@common.experiment()
def get_config(variant: str | None) -> Config:
  config = common.base("digits")
  config.model.dropout_rate = 0.3
  config.train.num_steps = 1500
  recipes.use(config, "modern")
  config.optim.lr = 2e-3
  config.optim.warmup_steps = 50
  config.optim.weight_decay = 0.3
  config.train.batch_size = 64
  config.eval.every = 100
  config.eval.batch_size = 64
  config.checkpoint.every = 200
  config.logging.every = 10
  return config
