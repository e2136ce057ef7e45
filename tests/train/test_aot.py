"""The step compiled for TPU pods that need not be there (needs libtpu)."""

import importlib.util
import json

import pytest

from tests.train.helpers import run_python

WORKER = """
import functools, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from configs import common
from spectraformer_jax import nn
from spectraformer_jax.nn import from_config
from spectraformer_jax.train.step import optim, state, steps
from spectraformer_jax.train.devices import parallel
from tests.train.workers import ALL_REDUCE, OTHER_COLLECTIVES

topology, engine = sys.argv[1:]
devices = list(
  topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
)
config = common.base("text")
feature_map = from_config.make_feature_map(config)
model = nn.Classifier(
  vocab_size=257, num_classes=2, max_len=4000, feature_map=feature_map,
  dropout_rate=config.model.dropout_rate,
)
tx = optim.make_optimizer(config.optim, config.train.num_steps)
keys = state.run_keys(0)
train_state = state.create(model, feature_map, tx, keys)
step = functools.partial(steps.train_step, apply_fn=model.apply, tx=tx)
mapped = parallel.map_step(
  step, 3, engine=engine, devices=devices, donate_state=True
)
rows = 2  # of each device
lead = (len(devices), rows) if engine == "pmap" else (len(devices) * rows,)
mesh = Mesh(np.array(devices), ("data",))
struct = lambda shape, dtype, spec: jax.ShapeDtypeStruct(
  shape, dtype, sharding=NamedSharding(mesh, spec)
)
batch = {
  "tokens": struct((*lead, 4000), jnp.uint16, P("data")),
  "length": struct(lead, jnp.int32, P("data")),
  "label": struct(lead, jnp.int32, P("data")),
  "weight": struct(lead, jnp.float32, P("data")),
}
like = lambda leaf: struct(leaf.shape, leaf.dtype, P())
compiled = mapped.lower(
  jax.tree.map(like, train_state), batch, like(keys.dropout_rng)
).compile()
text = compiled.as_text()
print(json.dumps({
  "devices": len(devices),
  "all_reduces": len(re.findall(ALL_REDUCE, text)),
  "others": len(re.findall(OTHER_COLLECTIVES, text)),
  "peak_mib": compiled.memory_analysis().peak_memory_in_bytes / 2**20,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
@pytest.mark.parametrize("engine", ["pmap", "jit"])
@pytest.mark.parametrize(
  "topology, devices", [("v5e:4x4", 16), ("v5e:16x16", 256)]
)
def test_one_all_reduce_on_a_pod(topology, devices, engine, monkeypatch):
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  monkeypatch.setenv("TPU_LOG_DIR", "disabled")
  code, out, err = run_python("-c", WORKER, topology, engine)
  assert code == 0, err
  facts = json.loads(out.splitlines()[-1])
  print(facts)
  assert facts["devices"] == devices
  assert facts["all_reduces"] == 1 and facts["others"] == 0
  assert facts["peak_mib"] < 16 * 1024  # of a v5e chip; compiling checks too
