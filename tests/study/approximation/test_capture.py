import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen

import spectraformer_jax as sf
from spectraformer_jax import nn
from spectraformer_jax.study.approximation.capture import (
  capture,
  capture_workdir,
)
from spectraformer_jax.train.config import default_config
from spectraformer_jax.train.inputs import load_data
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.typing import FeatureVariables
from tests.train.helpers import TINY


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.quick_every(2)
def test_captured_inputs_give_what_the_layer_gave(positions):
  fm = sf.feature_map("oprf", "iid", num_features=8)
  model = nn.Classifier(
    vocab_size=9,
    num_classes=2,
    max_len=7,
    embed_dim=8,
    num_layers=2,
    head_dim=4,
    mlp_dim=8,
    pooling="cls",
    positions=positions,
    feature_map=fm,
  )
  tokens = jax.random.randint(jax.random.key(0), (2, 7), 1, 9)
  length = jnp.array([7, 3])
  variables = model.init(jax.random.key(1), tokens, length)
  layers = capture(model, variables, tokens, length)
  assert [layer.name for layer in layers] == ["layer_0", "layer_1"]
  _, seen = model.apply(
    variables,
    tokens,
    length,
    capture_intermediates=lambda module, _: module.name == "attention",
  )
  for layer in layers:
    # With the CLS token in front.
    assert layer.key_mask.sum(axis=1).tolist() == [8, 4]
    part = lambda tree: tree["encoder"][layer.name]["attention"]  # noqa: B023
    projection = part(variables["random_features"])["projection"]
    maps = FeatureVariables({}, projection)
    masks = {"key_mask": layer.key_mask, "query_mask": layer.key_mask}
    # An encoder's queries count in the statistics.
    x, y = (a * 4**-0.25 for a in (layer.query, layer.key))
    stats = fm.calibrate(maps, x, y, **masks)
    out = sf.spectral_attention(
      *(jnp.asarray(x) for x in (layer.query, layer.key, layer.value)),
      feature_map=fm,
      variables=maps,
      stats=stats,
      key_mask=jnp.asarray(layer.key_mask),
    )
    dense = part(variables["params"])["out"]
    out = np.einsum("btnh,nhd->btd", out, dense["kernel"])
    out += np.asarray(dense["bias"])
    given = part(seen["intermediates"])["__call__"][0]
    np.testing.assert_allclose(out, given, atol=1e-5)


def test_a_model_without_attention():
  model, x = linen.Dense(2), jnp.ones((1, 3))
  with pytest.raises(ValueError, match="Dense has no SpectralSelfAttention"):
    capture(model, model.init(jax.random.key(0), x), x)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A trained workdir and its config."""
  config = default_config()
  folder = tmp_path_factory.mktemp("run")
  config.update_from_flattened_dict(
    TINY
    | {
      "task.cache_dir": str(tmp_path_factory.mktemp("tokens")),
      "model.attention": "softmax",
      "optim.warmup_steps": 1,
      "train.num_steps": 4,
      "eval.every": 4,
      "checkpoint.every": 2,
    }
  )
  train_and_evaluate(config, folder)
  return folder, config


def stored_params(folder, step):
  """As orbax reads them, without a model."""
  path = folder.absolute() / "checkpoints" / str(step) / "state"
  return ocp.StandardCheckpointer().restore(path)["params"]


@pytest.mark.filterwarnings("ignore")  # orbax: restored without shardings
@pytest.mark.slow
def test_workdir_by_hand(run):
  folder, config = run
  for step, name in ((4, "last"), (2, "2")):
    (layer,) = capture_workdir(folder, split="dev", examples=3, step=name)
    params = stored_params(folder, step)
    dev = load_data(config)["dev"]
    tokens = np.stack([dev[i]["tokens"] for i in range(3)]).astype(int)
    x = params["token_embedding"]["embedding"][tokens]
    x = x + params["position_embedding"][None, : tokens.shape[1]]
    block = params["encoder"]["layer_0"]
    norm = block["LayerNorm_0"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-6
    )
    x = x * norm["scale"] + norm["bias"]
    for part in ("query", "key", "value"):
      dense = block["attention"][part]
      by_hand = np.einsum("btd,dnh->btnh", x, dense["kernel"]) + dense["bias"]
      np.testing.assert_allclose(getattr(layer, part), by_hand, atol=1e-4)
    assert layer.key_mask.all()


@pytest.mark.slow
def test_workdirs_that_are_none(run, tmp_path):
  folder, _ = run
  arguments = {"split": "dev", "examples": 2, "step": "best"}
  with pytest.raises(ValueError, match="is no workdir: no config.json"):
    capture_workdir(tmp_path, **arguments)
  with pytest.raises(ValueError, match="no checkpoint of step '3'.*2, 4"):
    capture_workdir(folder, **arguments | {"step": "3"})
  with pytest.raises(ValueError, match="--examples must be at most"):
    capture_workdir(folder, **arguments | {"examples": 10**6})
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  with pytest.raises(ValueError, match="holds no checkpoint"):
    capture_workdir(tmp_path, **arguments)
  assert not (tmp_path / "checkpoints").exists()
