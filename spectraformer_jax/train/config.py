"""The configuration: every key there is, and the checks made before any work.

Experiments (``configs/*.py``) start from `default_config` and change values.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.nn.attention import ATTENTIONS
from spectraformer_jax.nn.encoder import MLPS, NORMS
from spectraformer_jax.nn.positions import POSITIONS
from spectraformer_jax.nn.sequence_encoder import POOLED_NORMS, POOLINGS
from spectraformer_jax.train.objectives import OBJECTIVES
from spectraformer_jax.train.parallel import ENGINES
from spectraformer_jax.train.recipes import recipe

# Sections whose keys belong to somebody else (a component, a matrix, a task),
# who checks them; any key may be set there.
OPEN_SECTIONS = (
  "task.kwargs",
  "model.attention_kwargs",
  "feature_map.component_kwargs",
  "feature_map.weight_matrix_kwargs",
)

CHOICES = {
  "model.attention": ATTENTIONS,
  "model.pooling": POOLINGS,
  "model.pooled_norm": POOLED_NORMS,
  "model.positions": POSITIONS,
  "model.mlp": MLPS,
  "model.norm": NORMS,
  "train.objective": OBJECTIVES,
  "optim.schedule": ("linear", "cosine", "rsqrt"),
  "optim.clip": ("value", "global_norm", "none"),
  "train.parallel": ENGINES,
  "train.precision": ("float32", "bfloat16"),
  "train.remat": (False, True),
}
POSITIVE_INTS = (
  *("model.embed_dim", "model.num_layers", "model.num_heads"),
  *("model.head_dim", "model.mlp_dim", "feature_map.num_features"),
  *("train.num_steps", "train.batch_size", "train.max_skipped_steps"),
  "train.accumulate",
  *("eval.every", "eval.batch_size"),
  *("checkpoint.every", "checkpoint.keep", "logging.every"),
  "task.pad_to_multiple",
)
# Optional sizes: None takes the data set's.
OPTIONAL_POSITIVE_INTS = ("model.vocab_size", "model.max_len")
# key: (test, what is right)
RANGES = {
  "model.dropout_rate": (lambda x: 0 <= x < 1, "in [0, 1)"),
  "feature_map.redraw_interval": (lambda x: x >= 0, "0 (never) or more"),
  "optim.lr": (lambda x: x > 0, "positive"),
  "optim.warmup_steps": (lambda x: x >= 0, "0 or more"),
  "optim.b1": (lambda x: 0 <= x < 1, "in [0, 1)"),
  "optim.b2": (lambda x: 0 <= x < 1, "in [0, 1)"),
  "optim.eps": (lambda x: x > 0, "positive"),
  "optim.weight_decay": (lambda x: x >= 0, "0 or more"),
  "optim.clip_threshold": (lambda x: x > 0, "positive"),
  "optim.feature_map_lr": (
    lambda x: x is None or x >= 0,
    "0 or more, or None for config.optim.lr",
  ),
  "optim.label_smoothing": (lambda x: 0 <= x < 1, "in [0, 1)"),
  "optim.ema_decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
  "eval.patience": (lambda x: x >= 0, "0 (never) or more"),
  "task.seed": (lambda x: x >= 0, "0 or more"),
  "train.seed": (lambda x: x >= 0, "0 or more"),
  "logging.interval_seconds": (lambda x: x >= 0, "0 or more"),
  "profile": (lambda x: x >= 0, "0 (off) or more steps"),
}


NUM_STEPS = 50_000


def default_config() -> ConfigDict:
  """The paper's model and the official training settings.

  Model and optimiser are those of the Spectraformer release for Long Range
  Arena (Nguyen, Joshi, Salim, arXiv 2405.15310, and its code): 2 layers, 2
  heads of 32, 128 features; AdamW, learning rate 1e-4, 1000 steps of warm-up,
  linear decay, gradients clipped by value, 50,000 steps of 32 sequences.

  Returns:
    An unlocked `ConfigDict`; docs/training.md explains each key.

  Example:
    >>> default_config().feature_map.component
    'oprf'
  """
  return ConfigDict(
    {
      "task": {
        "name": "digits",
        "seed": 0,
        "cache_dir": placeholder(str),
        "tokenizer": placeholder(str),
        "pad_to_multiple": 1,
        "buckets": (),
        "kwargs": {},
      },
      "model": {
        "attention": "spectral",
        "attention_kwargs": {},
        "embed_dim": 64,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 32,
        "mlp_dim": 128,
        "dropout_rate": 0.1,
        "pooling": "mean",
        "pooled_norm": "none",
        "positions": "learned",
        "mlp": "gelu",
        "norm": "pre",
        "vocab_size": placeholder(int),
        "max_len": placeholder(int),
        "init_from": placeholder(str),
      },
      "feature_map": {
        "component": "oprf",
        "weight_matrix": "orf",
        "num_features": 128,
        "redraw_interval": 0,
        "component_kwargs": {},
        "weight_matrix_kwargs": {},
      },
      "optim": {
        **recipe("official", NUM_STEPS),
        "feature_map_lr": placeholder(float),
        "label_smoothing": 0.0,
        "ema_decay": 0.0,
      },
      "train": {
        "seed": 0,
        "objective": "classify",
        "num_steps": NUM_STEPS,
        "batch_size": 32,
        "max_skipped_steps": 10,
        "parallel": "pmap",
        "precision": "float32",
        "accumulate": 1,
        "remat": False,
      },
      "eval": {"every": 500, "batch_size": 32, "patience": 0},
      "checkpoint": {"every": 500, "keep": 2},
      "logging": {
        "every": 50,
        "interval_seconds": 15.0,
        "tensorboard": True,
        "wandb": placeholder(str),
        "progress_bar": placeholder(bool),
      },
      "profile": 0,
    }
  )


def to_dict(config: ConfigDict) -> dict[str, Any]:
  """`config` as plain nested JSON values (tuples become lists)."""
  return json.loads(json.dumps(config.to_dict()))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Leaves by dotted path; an open section stays one leaf.

  Example:
    >>> flatten({"optim": {"lr": 0.1}})
    {'optim.lr': 0.1}
  """
  return dict(_walk(tree, prefix))


def _walk(tree, prefix) -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    path = f"{prefix}.{name}" if prefix else name
    if isinstance(value, Mapping) and path not in OPEN_SECTIONS:
      yield from _walk(value, path)
    else:
      yield path, value


def check_key(path: str) -> None:
  """Refuses a key that no configuration has.

  Args:
    path: dotted, without "config.": "optim.lr".

  Raises:
    ValueError: unknown; the message names the nearest known key.

  Example:
    >>> check_key("optim.lr")
  """
  known = flatten(default_config().to_dict())
  if path in known or path.startswith(tuple(f"{p}." for p in OPEN_SECTIONS)):
    return
  raise ValueError(f"Unknown config key {path!r}.{_nearest(path, known)}")


def _nearest(path, known) -> str:
  """Where `path` may have been meant to point."""
  sections = sorted({key.split(".")[0] for key in known})
  section, _, rest = path.partition(".")
  inside = [key.split(".", 1)[1] for key in known if key.startswith(path + ".")]
  if inside:
    return f" It is a section; set one of {', '.join(sorted(inside))}."
  same_name = [key for key in known if key.split(".")[-1] == rest]
  close = same_name or difflib.get_close_matches(path, known, n=1, cutoff=0.5)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  siblings = sorted(
    k.split(".", 1)[1] for k in known if k.startswith(f"{section}.")
  )
  if section in sections:
    return f"{hint} Known in {section}: {', '.join(siblings)}."
  return f"{hint} Known sections: {', '.join(sections)}."


def validate(config: ConfigDict) -> None:
  """Checks keys and values; nothing is built or compiled.

  Names of components, matrices and tasks are checked by those who own them.

  Args:
    config: as `default_config` or an experiment returns it.

  Raises:
    ValueError: one line that names the key, its value and what would be right.
  """
  values = flatten(config.to_dict())
  for path in values:
    check_key(path)
  for path in flatten(default_config().to_dict()):
    if path not in values:
      raise ValueError(
        f"Config key {path!r} is missing; start from "
        "spectraformer_jax.train.config.default_config()."
      )
  for path in POSITIVE_INTS:
    check_positive_int(f"config.{path}", values[path])
  for path in OPTIONAL_POSITIVE_INTS:
    if values[path] is not None:
      check_positive_int(f"config.{path}", values[path])
  for path, known in CHOICES.items():
    if values[path] not in known:
      raise ValueError(
        f"config.{path} must be one of {', '.join(map(str, known))}, "
        f"got {values[path]!r}."
      )
  for path, (is_right, right) in RANGES.items():
    if not is_right(values[path]):
      raise ValueError(f"config.{path} must be {right}, got {values[path]!r}.")
  for bucket in values["task.buckets"]:
    check_positive_int("config.task.buckets", bucket)
  steps, warmup = values["train.num_steps"], values["optim.warmup_steps"]
  # The schedule "rsqrt" knows no last step: a run may end while it rises.
  if warmup >= steps and values["optim.schedule"] != "rsqrt":
    raise ValueError(
      f"config.optim.warmup_steps must be less than config.train.num_steps "
      f"= {steps}, got {warmup}."
    )


def pair_name(config: ConfigDict) -> str:
  """The pair as it is written, or the name of the baseline.

  Example:
    >>> pair_name(default_config())
    'oprf-orf'
  """
  if config.model.attention != "spectral":
    return config.model.attention
  return f"{config.feature_map.component}-{config.feature_map.weight_matrix}"
