"""Recipes: values of `config.optim` that belong together, set by one name.

A recipe sets values and nothing else: each can be changed afterwards, and
config.json shows what a run used.
"""

from typing import Any

from spectraformer_jax.registry import nearest
from spectraformer_jax.train.config import KEYS, Config

NAMES = ("official", "lra", "modern")


def recipe(name: str, num_steps: int) -> dict[str, Any]:
  """Returns the values of a recipe, by key of `config.optim`.

  "official": the Spectraformer release (Nguyen, Joshi, Salim, arXiv 2405.15310,
  and its code), the defaults of the config. "lra": Long Range Arena's code for
  its texts (Tay et al., 2021,
  lra_benchmarks/text_classification/configs/base_tc_config.py). "modern": what
  is usual for Transformers today, after Loshchilov and Hutter, 2019.

  Args:
    name: one of `NAMES`.
    num_steps: of the run; "modern" warms up for a twentieth of them.

  Raises:
    ValueError: unknown name.

  Example:
    >>> recipe("modern", 50_000)["warmup_steps"]
    2500
  """
  if name not in NAMES:
    raise ValueError(
      f"Unknown recipe {name!r} of the optimiser.{nearest(name, NAMES)}"
    )
  lra = {
    # The rate of that code, 0.05 / sqrt(step), at the end of the warm-up.
    "lr": 0.05 / 8000**0.5,
    "schedule": "rsqrt",
    "warmup_steps": 8000,
    "b1": 0.9,
    "b2": 0.98,
    "eps": 1e-9,
    "weight_decay": 0.1,
    "clip": "none",
    "clip_threshold": 1.0,
  }
  modern = {
    "lr": 1e-3,
    "schedule": "cosine",
    "warmup_steps": num_steps // 20,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-6,
    "weight_decay": 0.05,
    "clip": "global_norm",
    "clip_threshold": 1.0,
  }
  official = {key: KEYS[f"optim.{key}"].default for key in modern}
  return {"official": official, "lra": lra, "modern": modern}[name]


def use(config: Config, name: str) -> None:
  """Sets the keys of a recipe in `config.optim`; its other keys stay.

  Args:
    config: has the number of steps of the run.
    name: one of `NAMES`.

  Raises:
    ValueError: unknown name.

  Example:
    >>> from spectraformer_jax.train.config import default_config
    >>> config = default_config()
    >>> use(config, "lra")
    >>> config.optim.schedule
    'rsqrt'
  """
  config.optim.update(recipe(name, config.train.num_steps))
