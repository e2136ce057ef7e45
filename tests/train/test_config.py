import functools
import json
import pathlib

import pytest

from configs import digits, listops
from spectraformer_jax.nn.from_config import make_feature_map
from spectraformer_jax.study.sweep.cells import Sweep, expand
from spectraformer_jax.train.config import (
  KEYS,
  OPEN_SECTIONS,
  check_key,
  default_config,
  flatten,
  is_none,
  pair_name,
  to_dict,
  validate,
)
from spectraformer_jax.train.run.run_folder import check_config

OPTIONAL = [path for path, key in KEYS.items() if key.is_optional]
# The keys that take any text; their owners check it.
TEXTS = (
  "task.name",
  "task.cache_dir",
  "task.tokenizer",
  "model.init_from",
  "train.teacher",
  "feature_map.component",
  "feature_map.weight_matrix",
  "logging.wandb",
)
EXPERIMENTS = {
  "default": default_config,
  "digits": digits.get_config,
  "listops": listops.get_config,
  **{
    f"listops:{variant}": functools.partial(listops.get_config, variant)
    for variant in ("quick", "deep", "pretrain", "deep-finetune")
  },
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_complete_and_valid(name):
  config = EXPERIMENTS[name]()
  validate(config)
  assert (
    flatten(to_dict(config)).keys() == flatten(to_dict(default_config())).keys()
  )
  assert json.loads(json.dumps(to_dict(config))) == to_dict(config)


def test_stages_of_self_pretraining_differ_in_two_keys():
  labels = flatten(to_dict(listops.get_config("deep")))
  stages = {
    "pretrain": {"train.objective": "masked"},
    "finetune": {
      "model.init_from": "runs/listops-deep-pretrain-oprf-orf-seed0"
    },
  }
  for stage, changes in stages.items():
    values = flatten(to_dict(listops.get_config(f"deep-{stage}")))
    assert values == labels | changes
  config = digits.get_config("finetune")
  assert config.model.init_from == "runs/digits-pretrain-oprf-orf-seed0"
  with pytest.raises(ValueError, match="Unknown variant 'fast'"):
    listops.get_config("fast-pretrain")


def test_the_papers_settings():
  values = flatten(to_dict(listops.get_config()))
  paper = {
    "model.embed_dim": 64,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.head_dim": 32,
    "model.mlp_dim": 128,
    "model.dropout_rate": 0.1,
    "model.positions": "learned",
    "model.mlp": "gelu",
    "model.norm": "pre",
    "model.pooling": "mean",
    "train.objective": "classify",
    "feature_map.num_features": 128,
    "optim.lr": 1e-4,
    "optim.warmup_steps": 1000,
    "optim.schedule": "linear",
    "optim.clip": "value",
    "train.batch_size": 32,
    "train.num_steps": 50_000,
    "eval.every": 500,
  }
  assert {path: values[path] for path in paper} == paper


def test_unknown_variant():
  with pytest.raises(ValueError, match="Unknown variant 'fast'.*quick"):
    listops.get_config("fast")
  with pytest.raises(ValueError, match="'quick'.*it has none"):
    digits.get_config("quick")


@pytest.mark.parametrize(
  "path, hint",
  [
    ("optim.lrr", "Did you mean 'optim.lr'"),
    ("train.lr", "Did you mean 'optim.lr'"),
    ("feature_map.num_featurs", "Did you mean 'feature_map.num_features'"),
    ("optm.lr", "Did you mean 'optim.lr'"),
    ("optim", "is a section; set one of b1, b2"),
    ("nonsense", "Known sections: checkpoint, eval"),
  ],
)
def test_unknown_key_names_the_nearest(path, hint):
  with pytest.raises(ValueError) as error:
    check_key(path)
  message = str(error.value)
  assert repr(path) in message and hint in message and "\n" not in message


def test_open_sections_take_any_key():
  for section in OPEN_SECTIONS:
    check_key(f"{section}.anything")
    check_key(section)


def test_unknown_key_in_a_config_object():
  config = default_config()
  config.optim.lrr = 1.0
  with pytest.raises(ValueError, match="'optim.lrr'.*'optim.lr'"):
    validate(config)


def test_missing_key():
  config = default_config()
  del config.optim.b1
  with pytest.raises(ValueError, match="'optim.b1' is missing"):
    validate(config)


@pytest.mark.parametrize(
  "path, value, right",
  [
    ("feature_map.num_features", 0, "positive integer"),
    ("model.head_dim", -1, "positive integer"),
    ("train.batch_size", 0, "positive integer"),
    ("train.num_steps", -5, "positive integer"),
    ("eval.every", 0, "positive integer"),
    ("checkpoint.keep", 0, "positive integer"),
    ("model.max_len", 0, "positive integer"),
    ("model.dropout_rate", 1.0, r"in \[0, 1\)"),
    ("model.attention", "sofmax", "one of spectral, softmax"),
    ("model.pooling", "max", "one of cls, mean"),
    ("model.window", -1, "None, an int of 0 or more, or a pair"),
    ("model.window", (3, 2, 1), "None, an int of 0 or more, or a pair"),
    ("model.num_sinks", -1, "an int of 0 or more"),
    ("optim.schedule", "step", "one of linear, cosine, rsqrt"),
    ("optim.clip", "norm", "one of value, global_norm, none"),
    ("optim.lr", 0.0, "positive"),
    ("optim.warmup_steps", 50_000, "less than config.train.num_steps"),
    ("feature_map.redraw_interval", -1, "0 .never. or more"),
  ],
)
def test_wrong_value(path, value, right):
  config = default_config()
  config.update_from_flattened_dict({path: value})
  with pytest.raises(ValueError, match=right) as error:
    validate(config)
  message = str(error.value)
  assert f"config.{path}" in message and repr(value) in message
  assert "\n" not in message


def with_value(path, value):
  """The default config with a value of any type."""
  config = default_config()
  section, key = path.split(".") if "." in path else (None, path)
  with config.ignore_type():
    (config[section] if section else config)[key] = value
  return config


@pytest.mark.parametrize("path", flatten(default_config().to_dict()))
def test_a_value_of_another_type_is_told_in_one_line(path):
  wrong = [object, "five", b"x", [None], {"a": {}}, float("nan"), 1j]
  if path not in OPTIONAL:
    wrong.append(None)
  if path in TEXTS:
    wrong.remove("five")
    wrong.append(3)
  if path.endswith("kwargs"):
    wrong.append([])
  for value in wrong:
    config = with_value(path, value)
    with pytest.raises(ValueError) as error:
      validate(config)
    message = str(error.value)
    assert path.split(".")[-1] in message and "\n" not in message, value


@pytest.mark.parametrize("path", OPTIONAL)
def test_what_may_be_none(path):
  validate(with_value(path, None))
  assert is_none(path, "none") and is_none(path, "None")
  assert not is_none(path, "no") and not is_none(path, None)


@pytest.mark.parametrize(
  ("path", "value", "right"),
  [
    ("model.dropout_rate", 0.999999, "when rounded to a multiple"),
    ("optim.warmup_steps", 2.5, "0 or more"),
    ("eval.patience", 1.5, "0 .never. or more"),
    ("optim.lr", float("inf"), "positive"),
    ("train.seed", 2**64, "below 2"),
    ("task.seed", -1, ">= 0"),
    ("task.buckets", 5, "a tuple of lengths"),
    ("task.kwargs", {"seed": 3}, "set config.task.seed"),
    ("task.kwargs", {"progress": 3}, "the run passes it itself"),
    ("task.kwargs", {"split": "dev"}, "the run passes it itself"),
    ("model.init_from", 3, "text or None"),
  ],
)
def test_siblings_of_wrong_values(path, value, right):
  with pytest.raises(ValueError, match=right):
    validate(with_value(path, value))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.init_head": True}, "init_head=True needs config.model.init_from"),
    (
      {"train.teacher": "x", "optim.label_smoothing": 0.1},
      "label_smoothing must be 0 with config.train.teacher.*got 0.1",
    ),
  ],
)
def test_options_that_would_have_no_effect(changes, message):
  config = default_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    validate(config)


def test_no_config():
  for config in ({}, None, default_config().to_dict()):
    with pytest.raises(ValueError, match="config must be a ConfigDict"):
      validate(config)


@pytest.mark.parametrize("name", ["kernel.x", "kernel[0]", "", "x.y.z"])
def test_an_option_is_one_name(name):
  with pytest.raises(ValueError, match="one name after"):
    check_key(f"feature_map.component_kwargs.{name}")


def test_options_that_a_pair_cannot_use():
  config = default_config()
  config.feature_map.component_kwargs = {"kernel": [1]}
  validate(config)
  with pytest.raises(ValueError, match=r"kernel must be one of .*\(1,\)"):
    make_feature_map(config)


@pytest.mark.parametrize(
  "component", ["elu1", "cosformer", "taylor2", "rebased", "dpfp"]
)
@pytest.mark.parametrize("num_features", [128, None])
def test_a_pair_without_rows_has_no_features(component, num_features):
  config = default_config()
  config.feature_map.component = component
  config.feature_map.weight_matrix = "none"
  config.feature_map.num_features = num_features
  validate(config)
  assert make_feature_map(config).num_features is None
  config.feature_map.redraw_interval = 5
  with pytest.raises(ValueError, match="redraw_interval must be 0"):
    make_feature_map(config)


@pytest.mark.parametrize(
  "component", ["prototypes", "learned_exp", "hedgehog", "t2r"]
)
def test_a_learnt_pair_has_features_without_rows(component):
  config = default_config()
  config.feature_map.component = component
  config.feature_map.weight_matrix = "none"
  config.feature_map.num_features = 64
  validate(config)
  assert make_feature_map(config).num_features == 64
  config.feature_map.num_features = None
  with pytest.raises(ValueError, match="num_features must be a positive"):
    make_feature_map(config)


def test_options_of_a_learnt_pair():
  config = default_config()
  config.feature_map.component = "prototypes"
  config.feature_map.weight_matrix = "none"
  for share in ("learned", 0.5):
    config.feature_map.component_kwargs = {"share": share}
    validate(config)
    assert make_feature_map(config).component.share == share


def test_cells_of_a_sweep_without_rows(monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parents[2])
  sweep = Sweep(
    {"digits": "configs/digits.py"},
    ["elu1-none", "posrf-orf"],
    overrides={"feature_map.num_features": "none"},
  )
  elu1, posrf = (cell.config() for cell in expand(sweep))
  assert make_feature_map(elu1).info.name == "elu1-none"
  with pytest.raises(ValueError, match="num_features must be a positive"):
    make_feature_map(posrf)


@pytest.mark.parametrize(
  ("batch_size", "accumulate", "right"),
  [(8, 4, True), (8, 8, False), (1, 1, 0)],
)
def test_batch_norm_needs_two_examples(batch_size, accumulate, right):
  config = default_config()
  config.train.batch_size, config.train.accumulate = batch_size, accumulate
  validate(config)
  config.model.pooled_norm = "batch"
  if right:
    validate(config)
    return
  with pytest.raises(ValueError, match="at least 2 examples in each part"):
    validate(config)
  config.train.objective = "masked"  # does not pool
  validate(config)


def test_warmup_may_outlast_a_run_of_the_schedule_without_end():
  config = default_config()
  config.optim.schedule, config.optim.warmup_steps = "rsqrt", 80_000
  validate(config)


def test_buckets_are_positive_integers():
  config = default_config()
  config.task.buckets = (768, 1024)
  validate(config)
  config.task.buckets = (768, 0)
  with pytest.raises(ValueError, match="config.task.buckets .*got 0"):
    validate(config)


def test_pair_name():
  config = default_config()
  assert pair_name(config) == "oprf-orf"
  config.model.attention = "softmax"
  assert pair_name(config) == "softmax"


def test_options_of_a_baseline_are_checked_by_it_before_anything_is_built():
  config = default_config()
  config.model.attention = "local"
  config.model.attention_kwargs.blok_size = 8
  validate(config)  # the section takes any key
  with pytest.raises(ValueError, match="Did you mean 'block_size'"):
    make_feature_map(config)
  config.model.attention_kwargs = {"block_size": 8}
  assert make_feature_map(config) is None


def test_a_run_from_before_a_key_was_there_goes_on(tmp_path):
  config = to_dict(default_config())
  old = to_dict(default_config())
  del old["model"]["attention_kwargs"]
  (tmp_path / "config.json").write_text(json.dumps({"config": old}))
  check_config(tmp_path, config)
  config["model"]["attention_kwargs"] = {"block_size": 8}
  with pytest.raises(ValueError, match="config.model.attention_kwargs is {}"):
    check_config(tmp_path, config)
