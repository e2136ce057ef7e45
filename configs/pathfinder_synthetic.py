"""Pathfinder drawn here: whether a path joins two discs (not LRA's files).

  python train.py --config=configs/pathfinder_synthetic.py

Task: pictures of 32 x 32 by the rules of the public generator (Kim et al.,
2020; docs/data.md), 160,000 to train on, 20,000 dev, 20,000 test, drawn in
about two minutes. Half have a path: the commonest label gives 50 %. No table
has a row for these pictures and no figure is published. Results on them are not
results on Long Range Arena; those of the same settings on its files are in
configs/pathfinder.py.

Default: the settings of configs/pathfinder.py (Spectraformer release).

pathfinder_synthetic.py:lra: those of configs/pathfinder.py:lra (Long Range
Arena's code).

pathfinder_synthetic.py:pathx: pictures of 128 x 128 as in Path-X, 16,384
tokens, with the settings of configs/pathx.py; 20,000 to train on, 2,000 dev,
2,000 test, so that drawing them takes minutes and not hours.

pathfinder_synthetic.py:quick: contours of 6 bars, 20,000 pictures to train on,
600 steps of 32 at 1e-3 with cosine decay. To see that a set-up runs, not to
learn: dev accuracy, measured here, seed 0, is 49.4 % after 200 steps, where it
was stopped, and other settings stayed at chance too (docs/data.md).

To compare with: where the two discs lie, without any path, gives 64 % by
boosted trees, and 73 % with 6 bars (docs/data.md).
"""

from configs import common, pathfinder, pathx


@common.experiment("lra", "pathx", "quick")
def get_config(variant):
  small = {"num_train": 20_000, "num_dev": 2_000, "num_test": 2_000}
  if variant == "pathx":
    config = pathx.get_config()
    config.task.kwargs = {"side": 128} | small
  else:
    config = pathfinder.get_config("lra" if variant == "lra" else None)
  config.task.name = "pathfinder_synthetic"
  if variant == "quick":
    config.task.kwargs = {"bars": 6} | small
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 50
    config.train.num_steps = 600
    config.train.batch_size = config.eval.batch_size = 32
    config.eval.every = 200
    config.checkpoint.every = 200
    config.logging.every = 10
  return config
