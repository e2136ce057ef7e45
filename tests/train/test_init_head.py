"""A run that starts from a whole model of another run, head included."""

import numpy as np
import pytest

from spectraformer_jax.train.pretrained import start_from
from tests.train import workers
from tests.train.helpers import finished_folder, first_state

NORM = {"model.pooled_norm": "batch", "model.pooling": "attention"}


@pytest.mark.parametrize("init_head", [True, False])
def test_head_and_pooling_are_taken_where_that_is_asked(
  init_head, tiny_config, tmp_path
):
  folder = tmp_path / "there"
  there = workers.named("", finished_folder(folder, tiny_config(**NORM)))
  options = {"model.init_from": str(folder), "model.init_head": init_head}
  config = tiny_config(**NORM | options)
  before = workers.named("", first_state(config))
  after = workers.named("", start_from(first_state(config), config)[0])
  own = [
    name
    for name in after
    if name.startswith((".params", ".collections"))
    and not any(part in name for part in ("encoder", "_embedding"))
  ]
  # Kernels and biases of the head, the norm, its moments, and the pooling.
  assert len(own) == 9
  for name in after:
    if name.startswith((".params", ".collections")):
      source = there if init_head or name not in own else before
      np.testing.assert_array_equal(after[name], source[name], name)
  assert any(not np.array_equal(before[x], there[x]) for x in own)


@pytest.mark.parametrize(
  ("there", "here", "facts", "message"),
  [
    ({}, {}, {"num_classes": 4}, r"holds head_logits/\w+ of shape"),
    (
      {"model.attention": "softmax"},
      {},
      {"num_classes": 4},
      "leave the head out with config.model.init_head=False",
    ),
    (
      {"train.objective": "masked"},
      {},
      {},
      "config.train.objective is 'masked' in .* and 'classify' here",
    ),
    ({}, NORM, {}, "config.model.pool.* there and .* here"),
  ],
)
def test_heads_that_do_not_fit_are_refused(
  there, here, facts, message, tiny_config, tmp_path
):
  folder = tmp_path / "there"
  finished_folder(folder, tiny_config(**there))
  options = {"model.init_from": str(folder), "model.init_head": True}
  config = tiny_config(**here, **options)
  with pytest.raises(ValueError, match=message) as error:
    start_from(first_state(config, **facts), config)
  assert "\n" not in str(error.value)
