"""Pathfinder, generated: whether a path joins two discs (not LRA's files).

  python train.py --config=configs/pathfinder_synthetic.py

Data: pictures of 32 x 32 by the rules of the public generator (Kim et al.,
2020; docs/data.md): 160,000 train, 20,000 dev and 20,000 test pictures, drawn
in about two minutes. Half have a path, so the commonest label gives 50 %. No
published figure belongs to these pictures, and results on them are not results
on Long Range Arena; configs/pathfinder.py has the same settings for its files.

Default: the settings of configs/pathfinder.py (Spectraformer release).

pathfinder_synthetic.py:lra: the settings of configs/pathfinder.py:lra (Long
Range Arena's code).

pathfinder_synthetic.py:pathx: pictures of 128 x 128 as in Path-X, 16,384
tokens, with the settings of configs/pathx.py; 20,000 train, 2,000 dev and 2,000
test pictures, which takes minutes and not hours.

pathfinder_synthetic.py:quick: contours of 6 bars, 80,000 train pictures, 500
steps of 128 at 3e-3 with cosine decay, minutes on a CPU; one layer of width 32,
learnt positions initialised as sinusoids and batch normalisation of the pooled
vector, without which the model stayed at chance (docs/data.md). Test accuracy,
measured here, best-dev parameters: 80.9 % with seed 0, 76.2 % with seed 1.

For comparison: boosted trees that see only the places of the two discs reach
64 % when fitted on 4,000 pictures; with 6 bars 73 %, and 79 % when fitted on
50,000 (docs/data.md).
"""

from configs import common, pathfinder, pathx
from spectraformer_jax.train.config import Config


@common.experiment("lra", "pathx", "quick")
def get_config(variant: str | None) -> Config:
  if variant == "pathx":
    config = pathx.get_config()
    config.task.kwargs = {"side": 128} | _sizes(20_000, 2_000)
  else:
    config = pathfinder.get_config("lra" if variant == "lra" else None)
  config.task.name = "pathfinder_synthetic"
  if variant == "quick":
    _set_quick(config)
  return config


def _sizes(train: int, rest: int) -> dict[str, int]:
  return {"num_train": train, "num_dev": rest, "num_test": rest}


def _set_quick(config: Config) -> None:
  common.set_quick(config)
  config.task.kwargs = {"bars": 6} | _sizes(80_000, 4_000)
  config.model.update(
    embed_dim=32,
    num_layers=1,
    num_heads=1,
    mlp_dim=64,
    vocab_size=256,
    positions="sinusoidal",
    pooled_norm="batch",
    dropout_rate=0.0,
  )
  config.feature_map.num_features = 16
  config.train.num_steps = 500
  config.optim.lr = 3e-3
  config.optim.b2 = 0.98
  config.train.batch_size = config.eval.batch_size = 128
  config.eval.every = config.checkpoint.every = 125
