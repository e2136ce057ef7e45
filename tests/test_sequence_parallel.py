"""One sequence over eight virtual devices equals one device.

The devices are those of a process of its own, which runs this file.
"""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import spectraformer_jax as sf

BATCH, LENGTH, HEADS, HEAD_DIM, ROWS = 2, 136, 2, 8, 16
CASES = {
  "posrf": ("posrf", False, 1),
  "posrf causal": ("posrf", True, 1),
  "posrf grouped": ("posrf", True, 2),
  "oprf": ("oprf", False, 1),
  "trigrf causal": ("trigrf", True, 1),
  "cosformer": ("cosformer", False, 1),
  "cosformer causal": ("cosformer", True, 1),
}


def case(component, is_causal, groups):
  """Returns the largest relative differences, and the collectives used."""
  matrix, rows = ("none", None) if component == "cosformer" else ("orf", ROWS)
  kwargs = {"max_length": LENGTH} if component == "cosformer" else None
  fm = sf.feature_map(
    component, matrix, num_features=rows, component_kwargs=kwargs
  )
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM, num_heads=HEADS)
  shape = (3, BATCH, LENGTH, HEADS, HEAD_DIM)
  query, key, value = jax.random.normal(jax.random.key(1), shape)
  query = jnp.tile(query, (1, 1, groups, 1)) * (
    1.0 + jnp.arange(HEADS * groups)[:, None]
  )
  ends = jnp.array([LENGTH, 100])
  key_mask = jnp.arange(LENGTH)[None] < ends[:, None]

  def gradients(attention, **kwargs):
    def loss(floats, rows):
      out = attention(
        *floats,
        feature_map=fm,
        variables=variables._replace(projection=rows),
        is_causal=is_causal,
        key_mask=key_mask,
        **kwargs,
      )
      weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
      return jnp.sum(out * weights.reshape(out.shape)), out

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))

  mesh = Mesh(np.array(jax.devices()), ("sequence",))
  divided = NamedSharding(mesh, P(None, "sequence"))
  arrays = tuple(jax.device_put(x, divided) for x in (query, key, value))
  over_devices = gradients(
    sf.sequence_parallel_attention, mesh=mesh, axis="sequence", chunk_size=8
  )
  expected = gradients(sf.spectral_attention)(
    (query, key, value), variables.projection
  )
  got = over_devices(arrays, variables.projection)
  pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True)
  differences = [
    float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-3))
    for a, b in pairs
    if a.dtype == np.float32
  ]
  lowered = over_devices.lower(arrays, variables.projection)
  collectives = re.findall(
    r"= f32\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)",
    lowered.compile().as_text(),
  )
  constant = fm.calibrate(variables, key, key) if component == "oprf" else None
  state = sf.init_state(
    fm,
    variables,
    batch_size=BATCH,
    num_heads=HEADS,
    head_dim=HEAD_DIM,
    stats=constant,
  )
  sizes = [int(np.prod([int(n) for n in s.split(",")])) for s, _ in collectives]
  return {
    "differences": differences,
    "sizes": sizes,
    "state": 8 * state.kv.size,
  }


@pytest.mark.slow
def test_values_gradients_and_traffic():
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": os.getcwd(),
  }
  process = subprocess.run(
    [sys.executable, "-m", "tests.test_sequence_parallel"],
    capture_output=True,
    text=True,
    env=env,
    timeout=600,
  )
  assert process.returncode == 0, process.stderr[-2000:]
  results = json.loads(process.stdout)
  assert results.keys() == CASES.keys()
  for name, result in results.items():
    # Output, three gradients and those of the projection; sums in another
    # order. The normalizers of trigrf cancel, which magnifies the rounding.
    tolerance = 1e-4 if "trigrf" in name else 1e-5
    assert len(result["differences"]) >= 4, name
    assert max(result["differences"]) < tolerance, (name, result)
    # The sums travel, and nothing else: no query, key or value.
    assert result["sizes"], name
    assert max(result["sizes"]) == result["state"], (name, result)


@pytest.mark.parametrize(
  ("length", "axis", "chunk_size", "message"),
  [
    (8, "tokens", None, "axis='tokens'"),
    (7, "sequence", None, "query length 7"),
    (8, "sequence", 0, "chunk_size must be"),
  ],
)
def test_refusals(length, axis, chunk_size, message):
  mesh = jax.sharding.AbstractMesh((2,), ("sequence",))
  fm = sf.feature_map("posrf", "orf", num_features=ROWS)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  x = jnp.ones((1, length, 1, HEAD_DIM))
  with pytest.raises(ValueError, match=message):
    sf.sequence_parallel_attention(
      *(x, x, x),
      mesh=mesh,
      axis=axis,
      feature_map=fm,
      variables=variables,
      chunk_size=chunk_size,
    )


if __name__ == "__main__":
  print(json.dumps({name: case(*args) for name, args in CASES.items()}))
