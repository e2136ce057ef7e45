"""fashion: Fashion-MNIST, pixel by pixel; stands in for Image.

  python -m spectraformer_jax.data fetch fashion
  python train.py --config=configs/fashion.py

Data: 28 x 28 images with two pixels of black around them, from Debian's
dataset-fashion-mnist or from idx files (--config.task.kwargs.data_dir=...). Dev
is 10 % of the training images by content (docs/data.md). Not the task of Long
Range Arena: no published figure belongs to it.

Default: the settings of the Spectraformer release for its image task
(configs/image.py), 50,000 steps. Not run here.

fashion.py:quick: 300 steps of 16 at 1e-3 with cosine decay and global-norm
clipping, minutes on a CPU. Test accuracy, measured here, seed 0, best-dev
parameters: 63.8 %.

For comparison: always predicting the commonest label gives 10.0 %, logistic
regression on the pixels of 8,000 images 82.9 % (`check fashion --linear`).
"""

from configs import common, image
from spectraformer_jax.train.config import Config


@common.experiment("quick")
def get_config(variant: str | None) -> Config:
  config = image.get_config()
  config.task.name = "fashion"
  if variant == "quick":
    common.set_quick(config)
  return config
