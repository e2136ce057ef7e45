"""The paper's table for two CPU cores: 10 attentions x 3 tasks x 3 seeds.

  python -m spectraformer_jax.study sweep configs/sweeps/small.py \
    --out=runs/small --jobs=2

Data made on the machine that runs it: the digits of scikit-learn (64 pixels),
and ListOps of up to 128 and of up to 512 tokens, from the grammar of Long Range
Arena with smaller lengths. None of these is a task of the paper. The model is
the paper's with half the features, for sequences this short. The optimiser is
that of configs/digits.py and of configs/listops.py:quick, which suits few
steps.

Not run in full yet. The dearest cell, softmax on lists-512, took 0.29 s a step
on one busy core, so 4 minutes in all; if the mean over cells is 2.4 minutes or
less, the 90 take at most 1.8 hours with two jobs.
"""

from spectraformer_jax.study.cells import Sweep

LISTOPS = {
  "task.kwargs.num_train": 20_000,
  "task.kwargs.num_dev": 500,
  "task.kwargs.num_test": 1000,
  "eval.batch_size": 50,
}


def get_sweep():
  return Sweep(
    tasks={
      "digits": "configs/digits.py",
      "lists-128": "configs/listops.py:quick",
      "lists-512": "configs/listops.py:quick",
    },
    attentions={
      "softmax": {},
      "gaussian": {},
      "oprf-orf": {},
      "oprf-qmc": {},
      "posrf-orf": {},
      "posrf-qmc": {},
      "linformer": {"model.attention_kwargs.projected_length": 64},
      "nystromformer": {"model.attention_kwargs.num_landmarks": 16},
      "skyformer": {"model.attention_kwargs.num_landmarks": 32},
      "local": {"model.attention_kwargs.block_size": 16},
    },
    seeds=(0, 1, 2),
    overrides={
      "feature_map.num_features": 64,
      "eval.every": 100,
      "logging.every": 20,
      "logging.tensorboard": False,
      "checkpoint.keep": 1,
    },
    task_overrides={
      "digits": {"train.num_steps": 500},
      "lists-128": {
        **LISTOPS,
        "task.kwargs.min_len": 32,
        "task.kwargs.max_len": 128,
        "train.num_steps": 1000,
        "train.batch_size": 32,
      },
      "lists-512": {
        **LISTOPS,
        "task.kwargs.min_len": 128,
        "task.kwargs.max_len": 512,
        "train.num_steps": 800,
        "train.batch_size": 16,
      },
    },
  )
