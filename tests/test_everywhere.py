"""Every public operation and every component under each of JAX's switches.

Components come from the registry, so that new ones are included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import spectraformer_jax as sf
from spectraformer_jax.baselines import BASELINES
from tests.helpers import smallest_map

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BATCH, LENGTH, HEADS, HEAD_DIM = 2, 9, 2, 8


def draw():
  """Returns random vectors ``[B, T, N, H]`` and which positions are real."""
  shape = (BATCH, LENGTH, HEADS, HEAD_DIM)
  x = 0.5 * jax.random.normal(jax.random.key(0), shape, jnp.float32)
  real = jnp.arange(LENGTH)[None] < jnp.array([[5], [LENGTH]])
  return x, real


@functools.cache
def build(component):
  """Builds a map of the component on the first matrix that fits."""
  matrix = dict(reversed(sf.list_feature_maps()))[component]
  fm = smallest_map(component, matrix, head_dim=HEAD_DIM)
  return fm, fm.init(jax.random.key(1), head_dim=HEAD_DIM, num_heads=HEADS)


def component_attention(component, x, real):
  """Calls attention, decoding if possible, and all of a map's methods."""
  fm, variables = build(component)
  maps = {"feature_map": fm, "variables": variables}
  stats = fm.calibrate(variables, x, x)
  outputs = [
    sf.spectral_attention(x, x, x, key_mask=real, query_mask=real, **maps),
    fm.apply(variables, x, side="query", stats=stats),
    fm.kernel(variables, x, x, stats=stats)
    if not fm.info.learnable and not stats
    else x,
  ]
  if fm.component.info.causal_safe:
    maps["stats"] = stats or None
    out, state = sf.spectral_attention(
      x, x, x, is_causal=True, return_state=True, **maps
    )
    one = x[:, :1]
    outputs += [out]
    if fm.component.longest is None:
      outputs += [sf.decode_step(state, one, one, one, **maps)[0]]
  return outputs


def _posrf():
  fm, variables = build("posrf")
  return {"feature_map": fm, "variables": variables}


SIZES = {
  "vocab_size": 7,
  "max_len": LENGTH + 3,
  "num_layers": 1,
  "head_dim": HEAD_DIM,
}


def _tokens():
  tokens = jnp.arange(BATCH * LENGTH, dtype=jnp.int32)
  return tokens.reshape(BATCH, LENGTH) % 7


def _generate(x, real):
  del real
  model = sf.nn.LanguageModel(feature_map=build("posrf")[0], **SIZES)
  tokens = _tokens()
  variables = model.init(jax.random.key(0), tokens)
  out = sf.nn.generate(model, variables, tokens, num_tokens=2)
  return out.astype(jnp.float32) + 0.0 * jnp.sum(x)


def _classify(x, real):
  model = sf.nn.Classifier(
    num_classes=3, feature_map=build("posrf")[0], **SIZES
  )
  args = _tokens(), jnp.sum(real, axis=1, dtype=jnp.int32)
  variables = model.init(jax.random.key(0), *args)
  return model.apply(variables, *args) + 0.0 * jnp.sum(x)


def _translate(x, real):
  model = sf.nn.Seq2Seq(feature_map=build("posrf")[0], **SIZES)
  length = jnp.sum(real, axis=1, dtype=jnp.int32)
  args = _tokens(), length, _tokens()[:, :3]
  variables = model.init(jax.random.key(0), *args)
  return model.apply(variables, *args) + 0.0 * jnp.sum(x)


def _encode(x, real):
  encoder = sf.nn.Encoder(
    feature_map=build("oprf")[0], num_layers=1, head_dim=HEAD_DIM
  )
  vectors = x.reshape(*x.shape[:2], -1)
  variables = encoder.init(jax.random.key(0), vectors, real)
  return encoder.apply(variables, vectors, real)


def _linformer(x, real):
  projections = {
    name: jnp.ones((HEADS, 4, LENGTH)) / LENGTH
    for name in ("key_projection", "value_projection")
  }
  return BASELINES["linformer"].attend(x, x, x, key_mask=real, **projections)


def _packed(x, real):
  del real
  ids = jnp.broadcast_to(jnp.arange(LENGTH) // 4, (BATCH, LENGTH))
  attend = functools.partial(sf.spectral_attention, **_posrf())
  return [
    attend(x, x, x, segment_ids=ids, is_causal=is_causal)
    for is_causal in (False, True)
  ]


def _exact_keys(x, real):
  attend = functools.partial(
    sf.spectral_attention, x, x, x, window=2, num_sinks=1, **_posrf()
  )
  ids = jnp.broadcast_to(jnp.arange(LENGTH) // 4, (BATCH, LENGTH))
  out, state = attend(key_mask=real, is_causal=True, return_state=True)
  one = x[:, :1]
  return [
    attend(key_mask=real, query_mask=real, num_heavy=2),
    attend(segment_ids=ids),
    out,
    sf.decode_step(state, one, one, one, **_posrf())[0],
  ]


def _redraw(x, real):
  del real
  fm, variables = _posrf().values()
  variables = fm.redraw(jax.random.key(3), variables)
  return sf.spectral_attention(x, x, x, feature_map=fm, variables=variables)


OPERATIONS = {
  "packed": _packed,
  "exact keys": _exact_keys,
  "linear": lambda x, real: sf.linear_attention(
    jnp.exp(x), jnp.exp(x), x, key_mask=real, is_causal=True
  ),
  "softmax": lambda x, real: sf.exact_attention(x, x, x, key_mask=real),
  "gaussian": lambda x, real: sf.exact_attention(
    x, x, x, kernel="gaussian", is_causal=True
  ),
  "local": lambda x, real: BASELINES["local"].attend(x, x, x, key_mask=real),
  "nystromformer": lambda x, real: BASELINES["nystromformer"].attend(
    x, x, x, key_mask=real, num_landmarks=4
  ),
  "attention_fn": lambda x, real: sf.as_attention_fn(*_posrf().values())(
    x, x, x
  ),
  "dot_product": lambda x, real: sf.as_dot_product_attention(
    *_posrf().values()
  )(x, x, x, is_causal=True),
  "weights": lambda x, real: sf.implied_attention_weights(x, x, **_posrf()),
  "redraw": _redraw,
  "skyformer": lambda x, real: BASELINES["skyformer"].attend(
    x, x, x, key_mask=real, num_landmarks=4
  ),
  "linformer": _linformer,
  "encoder": _encode,
  "classifier": _classify,
  "generate": _generate,
  "seq2seq": _translate,
} | {
  f"component {name}": functools.partial(component_attention, name)
  for name in sf.list_components()
}


def finite(tree):
  return all(
    np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree)
  )


def total(operation, real):
  """A scalar of x."""
  return lambda x: sum(
    jnp.sum(leaf.astype(jnp.float32))
    for leaf in jax.tree.leaves(operation(x, real))
  )


def under(switch, operation):
  """Runs under a switch of JAX's configuration."""
  with switch:
    x, real = draw()
    assert finite(jax.jit(operation)(x, real))


def transfer_guard(operation):
  x, real = draw()
  run = jax.jit(operation)
  run(x, real)
  with jax.transfer_guard("disallow"):
    out = run(x, real)
  assert finite(out)


def numpy_inputs(operation):
  x, real = draw()
  got = operation(np.asarray(x), np.asarray(real))
  expected = operation(x, real)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    got,
    expected,
  )


def hessian_vector(operation):
  x, real = draw()
  gradient = jax.grad(total(operation, real))
  assert finite(jax.jit(lambda x: jax.jvp(gradient, (x,), (x,)))(x))


def shard_map(operation):
  x, real = draw()
  mesh = jax.make_mesh((1,), ("b",), axis_types=(AxisType.Auto,))
  inside = jax.shard_map(
    lambda x, real: jax.tree.map(
      lambda leaf: jax.lax.psum(leaf, "b"), operation(x, real)
    ),
    mesh=mesh,
    in_specs=P("b"),
    out_specs=P(),
  )
  assert finite(jax.jit(inside)(x, real))


def mesh(kind, operation):
  x, real = draw()
  mesh = jax.make_mesh((1, 1), ("b", "h"), axis_types=2 * (kind,))
  x = jax.device_put(x, NamedSharding(mesh, P("b", None, "h")))
  assert finite(jax.jit(operation)(x, real))


def export(operation):
  x, real = draw()
  saved = jax.export.export(jax.jit(operation), platforms=["cpu", "tpu"])(
    x, real
  )
  assert finite(saved.call(x, real))


SWITCHES = {
  "x64": lambda f: under(jax.enable_x64(True), f),
  "strict": lambda f: under(jax.numpy_dtype_promotion("strict"), f),
  "debug_nans": lambda f: under(jax.debug_nans(True), f),
  "debug_infs": lambda f: under(jax.debug_infs(True), f),
  "transfer_guard": transfer_guard,
  "numpy": numpy_inputs,
  "hessian_vector": hessian_vector,
  "shard_map": shard_map,
  "auto": functools.partial(mesh, AxisType.Auto),
  "explicit": functools.partial(mesh, AxisType.Explicit),
  "export": export,
}


@pytest.mark.parametrize(
  "name",
  [
    name if name == "linear" else pytest.param(name, marks=pytest.mark.slow)
    for name in OPERATIONS
  ],
)
@pytest.mark.parametrize("switch", SWITCHES)
def test_everywhere(switch, name):
  for component in sf.list_components():
    if name.endswith(component) or component in ("posrf", "oprf"):
      build(component)  # outside of the switch, as users' variables are
  SWITCHES[switch](OPERATIONS[name])
