"""Path-X: Pathfinder at 128 x 128, 16,384 tokens (Long Range Arena).

  python train.py --config=configs/pathx.py \
    --config.task.kwargs.data_dir=/data/lra_release

Files: docs/lra.md; check them with `python -m spectraformer_jax.data check
pathx` first. The splits are made by content and are not those of Long Range
Arena.

Default: the Spectraformer release has no settings for this task. These are its
settings for Pathfinder with the batch size of Long Range Arena. No figure is
published for them.

pathx.py:lra: the settings of Long Range Arena's code (image/configs/
pathfinder128/base_pathfinder128_config.py: 1 layer, 2 heads of 8, 200 epochs)
with random-feature attention. Column Path-X of the leaderboard in its README is
FAIL for every model: none beats 50 %. One difference: attention weights have no
dropout, since linear attention does not form them.
"""

from configs import common
from spectraformer_jax.train import recipes
from spectraformer_jax.train.config import Config


@common.experiment("lra")
def get_config(variant: str | None) -> Config:
  config = common.base("pathx")
  config.train.batch_size = config.eval.batch_size = 64
  if variant == "lra":
    config.model.update(
      embed_dim=32, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32
    )
    recipes.use(config, "lra")
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 2500
    config.optim.weight_decay = 0.0
    config.optim.clip = "global_norm"
    config.train.num_steps = 500_000
    config.eval.every = config.checkpoint.every = 2500
    return config
  config.model.vocab_size = 512
  config.optim.lr = 2e-4
  config.optim.warmup_steps = 312
  return config
