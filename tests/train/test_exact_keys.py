"""Windows, sinks and heavy keys from the config to a trained model."""

import json

import pytest

from spectraformer_jax import nn
from spectraformer_jax.nn.from_config import make_feature_map
from spectraformer_jax.train.config import default_config
from spectraformer_jax.train.evaluate import evaluate
from spectraformer_jax.train.loop import train_and_evaluate


def test_a_run_trains_and_is_evaluated_with_its_exact_keys(
  uninterrupted, tiny_config, tmp_path
):
  changes = {
    "model.window": (7, 3),
    "model.num_sinks": 1,
    "model.num_heavy": 2,
    # Exact keys have no parameters: a run may start from one without them.
    "model.init_from": str(uninterrupted[0]),
    "train.num_steps": 3,
    "eval.every": 3,
    "checkpoint.every": 3,
  }
  result = train_and_evaluate(tiny_config(**changes), tmp_path)
  stored = json.loads((tmp_path / "config.json").read_text())["config"]["model"]
  assert (stored["window"], stored["num_heavy"]) == ([7, 3], 2)
  model = nn.load_pretrained(tmp_path).model
  assert (model.window, model.num_sinks, model.num_heavy) == ((7, 3), 1, 2)
  found = evaluate(tmp_path, split="dev")["accuracy"]
  assert found == pytest.approx(result["dev/accuracy_best"], abs=1e-6)
  with pytest.raises(ValueError, match=r"config.model.window is \[7, 3\] ther"):
    train_and_evaluate(tiny_config(**changes | {"model.window": 7}), tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.attention": "softmax"}, "window=3 with attention='softmax'"),
    ({"model.attention": "local"}, "window=3 with attention='local'"),
    (
      {"feature_map.component": "elu1", "feature_map.weight_matrix": "none"},
      "component 'elu1' estimates a kernel of its own",
    ),
    (
      {"model.num_heavy": 2, "train.objective": "causal"},
      "num_heavy cannot be combined with is_causal=True",
    ),
  ],
)
def test_exact_keys_that_a_run_cannot_have_are_refused(changes, message):
  config = default_config()
  config.update_from_flattened_dict({"model.window": 3} | changes)
  with pytest.raises(ValueError, match=message) as error:
    make_feature_map(config)
  assert "\n" not in str(error.value)
