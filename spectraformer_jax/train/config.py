"""The configuration: every key there is, and the checks made before any work.

Experiments (``configs/*.py``) start from `default_config` and change values.
"""

import difflib
import json
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.nn.attention import ATTENTIONS
from spectraformer_jax.nn.dropout import MAX_RATE
from spectraformer_jax.nn.encoder import MLPS, NORMS
from spectraformer_jax.nn.positions import POSITIONS
from spectraformer_jax.nn.sequence_encoder import POOLED_NORMS, POOLINGS
from spectraformer_jax.seeds import check_seed
from spectraformer_jax.train.devices.parallel import ENGINES
from spectraformer_jax.train.recipes import recipe
from spectraformer_jax.train.step.objectives import OBJECTIVES

# Sections whose keys belong to somebody else (a component, a matrix, a task),
# who checks them; any key may be set there.
OPEN_SECTIONS = (
  "task.kwargs",
  "model.attention_kwargs",
  "feature_map.component_kwargs",
  "feature_map.weight_matrix_kwargs",
)


def _is_count(x) -> bool:
  return isinstance(x, numbers.Integral) and x >= 0


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
  *("model.head_dim", "model.mlp_dim"),
  *("train.num_steps", "train.batch_size", "train.max_skipped_steps"),
  "train.accumulate",
  *("eval.every", "eval.batch_size"),
  *("checkpoint.every", "checkpoint.keep", "logging.every"),
  "task.pad_to_multiple",
)
# None takes the data set's size, or is that of a pair without weight matrix.
OPTIONAL_POSITIVE_INTS = (
  *("model.vocab_size", "model.max_len"),
  "feature_map.num_features",
)
SEEDS = ("task.seed", "train.seed")
NAMES = ("task.name", "feature_map.component", "feature_map.weight_matrix")
OPTIONAL_NAMES = (
  *("task.cache_dir", "task.tokenizer"),
  *("model.init_from", "logging.wandb"),
)
# On the command line these are None when they are written as none.
OPTIONAL = (
  *OPTIONAL_POSITIVE_INTS,
  *OPTIONAL_NAMES,
  *("optim.feature_map_lr", "logging.progress_bar"),
)
# key: (test of a finite number, what is right)
RANGES = {
  "model.dropout_rate": (
    lambda x: 0 <= x < MAX_RATE,
    "in [0, 1) when rounded to a multiple of 2**-16",
  ),
  "optim.lr": (lambda x: x > 0, "positive"),
  "optim.b1": (lambda x: 0 <= x < 1, "in [0, 1)"),
  "optim.b2": (lambda x: 0 <= x < 1, "in [0, 1)"),
  "optim.eps": (lambda x: x > 0, "positive"),
  "optim.weight_decay": (lambda x: x >= 0, "0 or more"),
  "optim.clip_threshold": (lambda x: x > 0, "positive"),
  "optim.label_smoothing": (lambda x: 0 <= x < 1, "in [0, 1)"),
  "optim.ema_decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
  "logging.interval_seconds": (lambda x: x >= 0, "0 or more"),
  "feature_map.redraw_interval": (_is_count, "0 (never) or more"),
  "optim.warmup_steps": (_is_count, "0 or more"),
  "eval.patience": (_is_count, "0 (never) or more"),
  "profile": (_is_count, "0 (off) or more steps"),
}
# Arguments of `data.load` that have keys of their own.
_RESERVED = ("seed", "tokenizer", "cache_dir", "progress")


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
  # Of numpy's numbers the Python ones.
  return json.loads(json.dumps(config.to_dict(), default=lambda x: x.item()))


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
  if path in known:
    return
  section, _, option = path.rpartition(".")
  if section in OPEN_SECTIONS and option.isidentifier():
    return
  for section in OPEN_SECTIONS:
    if path.startswith(f"{section}."):
      raise ValueError(
        f"Config key {path!r} must be one name after {section!r}: its options "
        "are numbers, texts and tuples."
      )
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
  if not isinstance(config, ConfigDict):
    raise ValueError(
      "config must be a ConfigDict, as spectraformer_jax.train.config."
      f"default_config() gives it, got {type(config).__name__}."
    )
  values = flatten(config.to_dict())
  for path in values:
    check_key(path)
  for path in flatten(default_config().to_dict()):
    if path not in values:
      raise ValueError(
        f"Config key {path!r} is missing; start from "
        "spectraformer_jax.train.config.default_config()."
      )
  _check_types(values)
  steps, warmup = values["train.num_steps"], values["optim.warmup_steps"]
  # The schedule "rsqrt" knows no last step: a run may end while it rises.
  if warmup >= steps and values["optim.schedule"] != "rsqrt":
    raise ValueError(
      f"config.optim.warmup_steps must be less than config.train.num_steps "
      f"= {steps}, got {warmup}."
    )
  _check_pooled_norm(values)


def _check_types(values: Mapping[str, Any]) -> None:
  """Every value by itself."""
  for path in POSITIVE_INTS:
    check_positive_int(f"config.{path}", values[path])
  for path in OPTIONAL_POSITIVE_INTS:
    if values[path] is not None:
      check_positive_int(f"config.{path}", values[path])
  for path in SEEDS:
    check_seed(f"config.{path}", values[path])
  for path in (*NAMES, *OPTIONAL_NAMES):
    optional = path in OPTIONAL_NAMES and values[path] is None
    if not (optional or isinstance(values[path], str)):
      right = "text or None" if path in OPTIONAL_NAMES else "text"
      raise ValueError(f"config.{path} must be {right}, got {values[path]!r}.")
  for path, known in CHOICES.items():
    if values[path] not in known:
      raise ValueError(
        f"config.{path} must be one of {', '.join(map(str, known))}, "
        f"got {values[path]!r}."
      )
  for path, (is_right, right) in RANGES.items():
    if not (_is_finite(values[path]) and is_right(values[path])):
      raise ValueError(f"config.{path} must be {right}, got {values[path]!r}.")
  rate = values["optim.feature_map_lr"]
  if not (rate is None or (_is_finite(rate) and rate >= 0)):
    raise ValueError(
      "config.optim.feature_map_lr must be 0 or more, or None for "
      f"config.optim.lr, got {rate!r}."
    )
  for path, right in (
    ("logging.tensorboard", (True, False)),
    ("logging.progress_bar", (True, False, None)),
  ):
    if values[path] not in right:
      raise ValueError(
        f"config.{path} must be one of {', '.join(map(str, right))}, got "
        f"{values[path]!r}."
      )
  buckets = values["task.buckets"]
  if not isinstance(buckets, tuple | list):
    raise ValueError(
      f"config.task.buckets must be a tuple of lengths, got {buckets!r}."
    )
  for bucket in buckets:
    check_positive_int("config.task.buckets", bucket)
  for path in OPEN_SECTIONS:
    _check_options(path, values[path])


def _is_finite(x: Any) -> bool:
  """Whether it is a number, and not NaN or infinite."""
  is_number = isinstance(x, numbers.Real) and not isinstance(x, bool)
  return is_number and math.isfinite(x)


def _check_options(section: str, options: Any) -> None:
  """An open section is flat: the owner of an option takes plain values."""
  if not isinstance(options, Mapping):
    raise ValueError(
      f"config.{section} must be options by name, got {options!r}."
    )
  for name, value in options.items():
    if isinstance(value, Mapping):
      raise ValueError(
        f"config.{section}.{name} must be a number, text or tuple, got "
        f"{dict(value)!r}."
      )
    if section == "task.kwargs" and name in _RESERVED:
      raise ValueError(
        f"config.task.kwargs cannot have {name!r}; set config.task.{name}."
      )


def _check_pooled_norm(values: Mapping[str, Any]) -> None:
  """Batch normalisation of one example gives 0, whatever it is."""
  if values["model.pooled_norm"] != "batch":
    return
  if values["train.objective"] != "classify":
    return  # a language model does not pool
  batch_size, parts = values["train.batch_size"], values["train.accumulate"]
  if batch_size < 2 * parts:
    raise ValueError(
      "config.model.pooled_norm='batch' needs at least 2 examples in each part "
      f"of a batch, got config.train.batch_size={batch_size} in "
      f"config.train.accumulate={parts} parts; lower accumulate or use "
      "pooled_norm='none'."
    )


def is_none(path: str, text: Any) -> bool:
  """Whether `text` unsets a key that may be None, as on the command line.

  Example:
    >>> is_none("feature_map.num_features", "none")
    True
    >>> is_none("feature_map.weight_matrix", "none")
    False
  """
  return path in OPTIONAL and isinstance(text, str) and text.lower() == "none"


def pair_name(config: ConfigDict) -> str:
  """The pair as it is written, or the name of the baseline.

  Example:
    >>> pair_name(default_config())
    'oprf-orf'
  """
  if config.model.attention != "spectral":
    return config.model.attention
  return f"{config.feature_map.component}-{config.feature_map.weight_matrix}"
