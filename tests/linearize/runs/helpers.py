"""Runs of made-up weights, which are not trained, to convert."""

import json

import jax
import numpy as np
import optax

from spectraformer_jax.nn.from_config import make_feature_map, make_model
from spectraformer_jax.train.config import default_config, to_dict
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.inputs import load_data
from spectraformer_jax.train.run import describe
from spectraformer_jax.train.run.checkpoints import Checkpointer
from spectraformer_jax.train.step.state import create, run_keys
from tests.train.helpers import TINY

CHANGES = {"model.num_layers": 2, "model.embed_dim": 16, "model.head_dim": 4}
STEP = 7


def run_config(cache_dir, **changes):
  """The config of a small softmax run on digits."""
  config = default_config()
  values = TINY | CHANGES | {"task.cache_dir": str(cache_dir)}
  config.update_from_flattened_dict(
    values | {"model.attention": "softmax"} | changes
  )
  return config


def sharpen(path, leaf):
  """Attention of fresh weights is uniform; of these it is not."""
  names = [entry.key for entry in path]
  is_sharp = names[-1] == "kernel" and names[-2] in ("query", "key")
  return 4.0 * leaf if is_sharp else leaf


def write_run(folder, config):
  """Writes the workdir of a finished run; returns its variables."""
  datasets = load_data(config)
  facts = {name: describe.split_facts(x) for name, x in datasets.items()}
  feature_map = make_feature_map(config)
  model = make_model(config, feature_map, facts["train"])
  new = create(model, feature_map, optax.identity(), run_keys(3))
  params = jax.tree_util.tree_map_with_path(sharpen, new.params)
  new = new._replace(params=params, step=np.int32(STEP))
  stored = {"config": to_dict(config), "data": facts, "environments": [{}]}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(stored))
  best = {"step": STEP, "accuracy": 0.5, "loss": 1.0}
  with Checkpointer(folder / "checkpoints", keep=1) as checkpointer:
    checkpointer.save(parallel.to_host(new), {"best": best}, best_step=STEP)
  row = {"step": STEP, "test/accuracy": 0.5}
  (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  return new.variables
