"""The configuration of a run: every key with its type, default and check.

Experiments (``configs/*.py``) start from `default_config` and change values.
"""

import difflib
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple, cast, get_args

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.hybrid_attention.exact_keys import (
  Window,
  check_window,
)
from spectraformer_jax.nn.attention_base import ATTENTIONS
from spectraformer_jax.nn.dropout import MAX_RATE
from spectraformer_jax.nn.encoder import MLPS, NORMS
from spectraformer_jax.nn.positions import POSITIONS
from spectraformer_jax.nn.sequence_encoder import POOLED_NORMS, POOLINGS
from spectraformer_jax.seeds import check_seed
from spectraformer_jax.train.devices.parallel import ENGINES
from spectraformer_jax.train.key_checks import (
  Check,
  check_buckets,
  check_options,
  count,
  must_be,
  number,
  one_of,
)
from spectraformer_jax.train.step.objectives import OBJECTIVES

Text = Annotated[str, must_be("text", lambda x: isinstance(x, str))]
OptionalText = Annotated[
  str | None, must_be("text or None", lambda x: isinstance(x, str))
]
Seed = Annotated[int, check_seed]
PositiveInt = Annotated[int, check_positive_int]
OptionalPositiveInt = Annotated[int | None, check_positive_int]
Positive = Annotated[float, number("positive", lambda x: x > 0)]
NonNegative = Annotated[float, number("0 or more", lambda x: x >= 0)]
Fraction = Annotated[float, number("in [0, 1)", lambda x: 0 <= x < 1)]
# Options of a component, a weight matrix, a baseline attention or a task. The
# section takes any key; the part that gets the options checks them.
Options = Annotated[ConfigDict | dict[str, Any], check_options]


# The classes below are never instantiated. A configuration is a `ConfigDict`,
# whose attributes a type checker does not know; these subclasses declare them.


class TaskSection(ConfigDict):
  """The data."""

  name: Text = "digits"
  seed: Seed = 0
  cache_dir: OptionalText = None
  tokenizer: OptionalText = None
  pad_to_multiple: PositiveInt = 1
  buckets: Annotated[tuple[int, ...], check_buckets] = ()
  kwargs: Options = {}


class ModelSection(ConfigDict):
  """The model; None as `vocab_size` or `max_len` means that of the data."""

  attention: Annotated[str, one_of(*ATTENTIONS)] = "spectral"
  attention_kwargs: Options = {}
  window: Annotated[Window, check_window] = None
  num_sinks: Annotated[int, count("an int of 0 or more")] = 0
  num_heavy: Annotated[int, count("an int of 0 or more")] = 0
  embed_dim: PositiveInt = 64
  num_layers: PositiveInt = 2
  num_heads: PositiveInt = 2
  head_dim: PositiveInt = 32
  mlp_dim: PositiveInt = 128
  dropout_rate: Annotated[
    float,
    number(
      "in [0, 1) when rounded to a multiple of 2**-16",
      lambda x: 0 <= x < MAX_RATE,
    ),
  ] = 0.1
  pooling: Annotated[str, one_of(*POOLINGS)] = "mean"
  pooled_norm: Annotated[str, one_of(*POOLED_NORMS)] = "none"
  positions: Annotated[str, one_of(*POSITIONS)] = "learned"
  mlp: Annotated[str, one_of(*MLPS)] = "gelu"
  norm: Annotated[str, one_of(*NORMS)] = "pre"
  vocab_size: OptionalPositiveInt = None
  max_len: OptionalPositiveInt = None
  init_from: OptionalText = None
  init_head: Annotated[bool, one_of(False, True)] = False


class FeatureMapSection(ConfigDict):
  """The pair of a component and a weight matrix.

  A component whose number of features head_dim sets, such as "elu1", ignores
  `num_features`.
  """

  component: Text = "oprf"
  weight_matrix: Text = "orf"
  num_features: OptionalPositiveInt = 128
  redraw_interval: Annotated[int, count("0 (never) or more")] = 0
  component_kwargs: Options = {}
  weight_matrix_kwargs: Options = {}


class OptimSection(ConfigDict):
  """The optimiser; the defaults are the recipe "official" of `recipes`."""

  lr: Positive = 1e-4
  schedule: Annotated[str, one_of("linear", "cosine", "rsqrt")] = "linear"
  warmup_steps: Annotated[int, count("0 or more")] = 1000
  b1: Fraction = 0.9
  b2: Fraction = 0.999
  eps: Positive = 1e-6
  weight_decay: NonNegative = 0.0
  clip: Annotated[str, one_of("value", "global_norm", "none")] = "value"
  clip_threshold: Positive = 1.0
  feature_map_lr: Annotated[
    float | None,
    number("0 or more, or None for config.optim.lr", lambda x: x >= 0),
  ] = None
  label_smoothing: Fraction = 0.0
  ema_decay: Fraction = 0.0


class TrainSection(ConfigDict):
  """The training loop; `batch_size` is that of all devices together."""

  seed: Seed = 0
  objective: Annotated[str, one_of(*OBJECTIVES)] = "classify"
  num_steps: PositiveInt = 50_000
  batch_size: PositiveInt = 32
  max_skipped_steps: PositiveInt = 10
  parallel: Annotated[str, one_of(*ENGINES)] = "pmap"
  precision: Annotated[str, one_of("float32", "bfloat16")] = "float32"
  accumulate: PositiveInt = 1
  remat: Annotated[bool, one_of(False, True)] = False
  teacher: OptionalText = None


class EvalSection(ConfigDict):
  """Evaluation on the dev split."""

  every: PositiveInt = 500
  batch_size: PositiveInt = 32
  patience: Annotated[int, count("0 (never) or more")] = 0


class CheckpointSection(ConfigDict):
  """How often checkpoints are written, and how many of the last are kept."""

  every: PositiveInt = 500
  keep: PositiveInt = 2


class LoggingSection(ConfigDict):
  """How often metrics are written, and where they are shown."""

  every: PositiveInt = 50
  interval_seconds: NonNegative = 15.0
  tensorboard: Annotated[bool, one_of(True, False)] = True
  wandb: OptionalText = None
  progress_bar: Annotated[bool | None, one_of(True, False, None)] = None


class Config(ConfigDict):
  """The configuration of a run; docs/training.md explains each key."""

  task: TaskSection
  model: ModelSection
  feature_map: FeatureMapSection
  optim: OptimSection
  train: TrainSection
  eval: EvalSection
  checkpoint: CheckpointSection
  logging: LoggingSection
  profile: Annotated[int, count("0 (off) or more steps")] = 0


class Key(NamedTuple):
  """What the classes above declare about one key.

  Attributes:
    default: its value in `default_config`.
    kind: the type of its values other than None; object if there are several.
    is_optional: whether it may be None.
    check: raises ValueError for a wrong value that is not None.
  """

  default: Any
  kind: type
  is_optional: bool
  check: Check


def _declared_keys(
  section: type, prefix: str = ""
) -> Iterator[tuple[str, Key]]:
  """Yields path and `Key` of each annotation, of inner sections too."""
  for name, annotation in inspect.get_annotations(section).items():
    if isinstance(annotation, type):
      yield from _declared_keys(annotation, f"{name}.")
      continue
    kind, check = get_args(annotation)
    is_optional = type(None) in get_args(kind)
    if is_optional:
      kinds = [x for x in get_args(kind) if x is not type(None)]
      kind = kinds[0] if len(kinds) == 1 else object
    yield prefix + name, Key(vars(section)[name], kind, is_optional, check)


# Every key by its dotted path, such as "optim.lr".
KEYS = dict(_declared_keys(Config))
# Sections of options, which take any key.
OPEN_SECTIONS = tuple(
  path for path, key in KEYS.items() if key.check is check_options
)


def default_config() -> Config:
  """Makes a configuration of the paper's model and its training settings.

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
  values: dict[str, Any] = {}
  for path, key in KEYS.items():
    section, _, name = path.rpartition(".")
    target = values.setdefault(section, {}) if section else values
    # A placeholder holds None and accepts only values of its type.
    target[name] = placeholder(key.kind) if key.default is None else key.default
  return cast(Config, ConfigDict(values))


def to_dict(config: ConfigDict) -> dict[str, Any]:
  """Returns `config` as nested JSON values; tuples become lists."""
  # NumPy's numbers become Python's.
  return json.loads(json.dumps(config.to_dict(), default=lambda x: x.item()))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns leaves by dotted path; a section of `OPEN_SECTIONS` is one leaf.

  Example:
    >>> flatten({"optim": {"lr": 0.1}})
    {'optim.lr': 0.1}
  """
  leaves = {}
  for name, value in tree.items():
    path = f"{prefix}.{name}" if prefix else name
    if isinstance(value, Mapping) and path not in OPEN_SECTIONS:
      leaves |= flatten(value, path)
    else:
      leaves[path] = value
  return leaves


def check_key(path: str) -> None:
  """Refuses a key that no configuration has.

  Args:
    path: dotted, without "config.": "optim.lr".

  Raises:
    ValueError: unknown key; the message names the nearest known one.

  Example:
    >>> check_key("optim.lr")
  """
  if path in KEYS:
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
  raise ValueError(f"Unknown config key {path!r}.{_hint(path)}")


def _hint(path: str) -> str:
  """Returns which key an unknown path may stand for, and which are known."""
  if inside := _keys_in(path):
    return f" It is a section; set one of {', '.join(inside)}."
  section, _, name = path.partition(".")
  same_name = [key for key in KEYS if key.split(".")[-1] == name]
  close = same_name or difflib.get_close_matches(path, KEYS, n=1, cutoff=0.5)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  if siblings := _keys_in(section):
    return f"{hint} Known in {section}: {', '.join(siblings)}."
  sections = sorted({key.split(".")[0] for key in KEYS})
  return f"{hint} Known sections: {', '.join(sections)}."


def _keys_in(section: str) -> list[str]:
  prefix = f"{section}."
  return sorted(k.removeprefix(prefix) for k in KEYS if k.startswith(prefix))


def validate(config: ConfigDict) -> None:
  """Checks keys and values; builds and compiles nothing.

  Names of components, matrices and tasks are checked where they are looked up.

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
  for path, key in KEYS.items():
    if path not in values:
      raise ValueError(
        f"Config key {path!r} is missing; start from "
        "spectraformer_jax.train.config.default_config()."
      )
    if not (key.is_optional and values[path] is None):
      key.check(f"config.{path}", values[path])
  steps, warmup = values["train.num_steps"], values["optim.warmup_steps"]
  # The schedule "rsqrt" does not depend on the number of steps: a run may end
  # while the learning rate still rises.
  if warmup >= steps and values["optim.schedule"] != "rsqrt":
    raise ValueError(
      f"config.optim.warmup_steps must be less than config.train.num_steps "
      f"= {steps}, got {warmup}."
    )
  _check_pooled_norm(values)
  _check_sources(values)


def _check_pooled_norm(values: Mapping[str, Any]) -> None:
  """Refuses batch normalisation over one example: its result is always 0."""
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


def _check_sources(values: Mapping[str, Any]) -> None:
  """Refuses options of another run's model that would have no effect."""
  if values["model.init_head"] and not values["model.init_from"]:
    raise ValueError(
      "config.model.init_head=True needs config.model.init_from, the run whose "
      "head to take, got None."
    )
  smoothing = values["optim.label_smoothing"]
  if values["train.teacher"] and smoothing:
    raise ValueError(
      "config.optim.label_smoothing must be 0 with config.train.teacher, whose "
      f"probabilities take the place of labels, got {smoothing}."
    )


def is_none(path: str, text: Any) -> bool:
  """Whether the command line's `text` means None, in a key that may be None.

  Example:
    >>> is_none("feature_map.num_features", "none")
    True
    >>> is_none("feature_map.weight_matrix", "none")
    False
  """
  is_optional = path in KEYS and KEYS[path].is_optional
  return is_optional and isinstance(text, str) and text.lower() == "none"


def pair_name(config: Config) -> str:
  """Returns "component-matrix", or the name of the baseline attention.

  Example:
    >>> pair_name(default_config())
    'oprf-orf'
  """
  if config.model.attention != "spectral":
    return config.model.attention
  return f"{config.feature_map.component}-{config.feature_map.weight_matrix}"
