"""The paper's table: 18 pairs and 6 others x 5 tasks x 3 seeds.

  LRA_DATA=/data python -m spectraformer_jax.study sweep \
    configs/sweeps/paper.py --out=runs/paper --shard=1/8

Each cell is a run of full length with the settings of the Spectraformer release
(configs/*.py). There are 360 cells; according to the authors' table, one takes
0.5 to 8 hours on their GPU. The sweep was not run here.

$LRA_DATA holds ``aclImdb``, ``cifar-10-batches-bin`` and ``lra_release``
(docs/lra.md); ListOps is generated.

A sparse grid (sgq) of level 2 always has 2 H + 1 = 65 rows; all other pairs
have the paper's 128.

The paper's rows Big Bird, Reformer and Informer are missing (docs/sweep.md says
why); the rows gaussian and local are not in the paper.
"""

import os

from spectraformer_jax.study.sweep import Sweep

COMPONENTS = ("oprf", "posrf", "saderf")
MATRICES = ("fastfood_learnable", "mm", "orf", "qmc", "sgq", "sorf")
FILES = {
  "text": "aclImdb",
  "retrieval": "lra_release",
  "image": "cifar-10-batches-bin",
  "pathfinder": "lra_release",
}


def get_sweep() -> Sweep:
  root = os.environ.get("LRA_DATA", "data")
  tasks = ("listops", *FILES)
  return Sweep(
    tasks={task: f"configs/{task}.py" for task in tasks},
    attentions={
      **{
        f"{c}-{m}": {"feature_map.num_features": 65} if m == "sgq" else {}
        for c in COMPONENTS
        for m in MATRICES
      },
      "softmax": {},
      "gaussian": {},
      # As many landmarks or projected positions as the pairs have features.
      "linformer": {"model.attention_kwargs.projected_length": 128},
      "nystromformer": {"model.attention_kwargs.num_landmarks": 128},
      "skyformer": {"model.attention_kwargs.num_landmarks": 128},
      "local": {"model.attention_kwargs.block_size": 128},
    },
    seeds=(0, 1, 2),
    overrides={"logging.tensorboard": False},
    task_overrides={
      task: {"task.kwargs.data_dir": os.path.join(root, folder)}
      for task, folder in FILES.items()
    },
  )
