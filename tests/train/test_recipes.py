"""Optimisers by name, in Python and behind the colon of --config."""

import pytest

from configs import digits, listops, text
from spectraformer_jax.train import recipes
from spectraformer_jax.train.config import default_config, flatten, validate


def optim_of(config):
  return config.optim.to_dict()


def test_official_is_the_default():
  config = default_config()
  before = optim_of(config)
  recipes.use(config, "official")
  assert optim_of(config) == before


def test_every_recipe_sets_the_same_keys_and_no_others():
  wanted = recipes.recipe("official", 1).keys()
  for name in recipes.NAMES:
    config = default_config()
    config.optim.ema_decay = 0.5
    recipes.use(config, name)
    validate(config)
    assert recipes.recipe(name, 1).keys() == wanted
    assert optim_of(config).keys() == optim_of(default_config()).keys()
    assert config.optim.ema_decay == 0.5


@pytest.mark.parametrize("name", recipes.NAMES)
def test_by_name_behind_the_colon(name):
  config = digits.get_config(f"recipe={name}")
  assert recipes.recipe(name, 1500).items() <= optim_of(config).items()
  # All else is as without it.
  others = lambda c: {
    k: v for k, v in flatten(c.to_dict()).items() if not k.startswith("optim.")
  }
  assert others(config) == others(digits.get_config())


def test_with_a_variant():
  config = listops.get_config("quick,recipe=modern")
  assert config.task.kwargs.max_len == 512  # of the variant
  assert config.optim.warmup_steps == 1000 // 20
  assert config.optim.weight_decay == 0.05  # the variant has 0
  # The variant "lra" has a model as well, the recipe has not.
  lra, recipe = text.get_config("lra"), text.get_config("recipe=lra")
  assert optim_of(lra) == optim_of(recipe)
  assert lra.model.embed_dim == 256 and recipe.model.embed_dim == 64


@pytest.mark.parametrize(
  "variant, message",
  [
    ("recipe=modem", "Unknown recipe 'modem'.*'modern'.*lra, modern, official"),
    ("recipe=", "Unknown recipe ''.*lra, modern, official"),
    ("recipe=lra,recipe=modern", "One recipe at a time"),
    ("quick,lra,recipe=lra", "Unknown variant 'quick,lra'"),
    ("modern", "Unknown variant 'modern'.*recipe=NAME"),
  ],
)
def test_mistakes(variant, message):
  with pytest.raises(ValueError, match=message) as error:
    listops.get_config(variant)
  assert "\n" not in str(error.value)
