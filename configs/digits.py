"""Handwritten digits as sequences of 64 pixels: the run to start with.

Task: the 1,797 images of scikit-learn's `load_digits`, 1,465 to train on, 181
dev, 151 test (data seed 0). Not a task of the paper: a stand-in for Long Range
Arena's image task that needs no download and is learnt in minutes.

Command: python train.py
Others:  python train.py --config.feature_map.component=posrf
         python train.py --config.model.attention=softmax
"""

from configs import common
from spectraformer_jax.train import recipes


@common.experiment()
def get_config(variant):
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
