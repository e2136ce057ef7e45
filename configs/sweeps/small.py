"""The paper's table for two CPU cores: 9 attentions x 3 tasks x 3 seeds.

  python -m spectraformer_jax.data fetch spam_bodies
  python -m spectraformer_jax.study sweep configs/sweeps/small.py \
    --out=runs/small --jobs=2

The data need no large download: the digits of scikit-learn (64 pixels), ListOps
of 32 to 127 tokens from the grammar of Long Range Arena, and the first 512
bytes of the mails of spam_bodies. None of these is a task of the paper. The
model is that of the paper with half the features, since the sequences are
short. The optimiser is that of the quick variants, which suits runs of few
steps.
"""

from spectraformer_jax.study.sweep import Sweep


def get_sweep() -> Sweep:
  return Sweep(
    tasks={
      "digits": "configs/digits.py",
      "lists-128": "configs/listops.py:quick",
      "spam-512": "configs/spam_bodies.py:quick",
    },
    attentions={
      "softmax": {},
      "gaussian": {},
      "oprf-orf": {},
      "oprf-qmc": {},
      "posrf-orf": {},
      "linformer": {"model.attention_kwargs.projected_length": 64},
      "nystromformer": {"model.attention_kwargs.num_landmarks": 16},
      "skyformer": {"model.attention_kwargs.num_landmarks": 32},
      "local": {"model.attention_kwargs.block_size": 16},
    },
    seeds=(0, 1, 2),
    overrides={
      "feature_map.num_features": 64,
      "eval.every": 200,
      "eval.batch_size": 50,
      "checkpoint.every": 200,
      "checkpoint.keep": 1,
      "logging.every": 20,
      "logging.tensorboard": False,
    },
    task_overrides={
      "digits": {"train.num_steps": 400},
      "lists-128": {
        "task.kwargs.min_len": 32,
        "task.kwargs.max_len": 128,
        "task.kwargs.num_train": 20_000,
        "task.kwargs.num_dev": 500,
        "task.kwargs.num_test": 1000,
        "train.num_steps": 600,
        "train.batch_size": 32,
      },
      "spam-512": {
        "task.kwargs.max_len": 512,
        "train.num_steps": 300,
        "train.batch_size": 16,
      },
    },
  )
